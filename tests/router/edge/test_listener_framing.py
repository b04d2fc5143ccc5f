"""One framing rule or 400: whatever could be read in two ways is refused, and what stands behind it is
never taken for a request.
"""

from __future__ import annotations

from tables import each
from wire import chunked, get, listening, post, response

HEAD = b"POST /first HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"

REFUSED: dict[str, bytes] = {
    # Two ways to say how long a body is
    "CL and TE": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE and CL": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "CL and TE identity": HEAD + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello",
    "two CLs that agree": HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "two CLs that differ": HEAD + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\nhello",
    "CL list": HEAD + b"Content-Length: 5, 5\r\n\r\nhello",
    "TE twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE chunked, then identity": HEAD
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    # Content-Length
    "CL a word": HEAD + b"Content-Length: five\r\n\r\nhello",
    "CL empty": HEAD + b"Content-Length:\r\n\r\n",
    "CL negative": HEAD + b"Content-Length: -5\r\n\r\nhello",
    "CL with plus": HEAD + b"Content-Length: +5\r\n\r\nhello",
    "CL hex": HEAD + b"Content-Length: 0x5\r\n\r\nhello",
    "CL with underscore": HEAD + b"Content-Length: 1_0\r\n\r\n0123456789",
    "CL with a fraction": HEAD + b"Content-Length: 5.0\r\n\r\nhello",
    "CL of two numbers": HEAD + b"Content-Length: 5 5\r\n\r\nhello",
    "CL beyond 64 bits": HEAD + b"Content-Length: 18446744073709551621\r\n\r\nhello",
    "CL of 20 digits": HEAD + b"Content-Length: 00000000000000000005\r\n\r\nhello",
    # Transfer-Encoding
    "TE gzip": HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    "TE gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "TE chunked, chunked": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "TE chunked, gzip": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "TE identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "TE empty": HEAD + b"Transfer-Encoding:\r\n\r\n",
    "TE quoted": HEAD + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "TE xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "TE with a vertical tab": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "TE in HTTP/1.0": b"POST /first HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    # Chunks
    "chunk size a word": CHUNKED + b"g\r\nhello\r\n0\r\n\r\n",
    "chunk size hex": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "chunk size negative": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "chunk size with plus": CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n",
    "chunk size empty": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "chunk size beyond 64 bits": CHUNKED + b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "chunk size, then a space": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "a space, then a chunk size": CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n",
    "chunk size, bare LF": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "chunk size, bare CR": CHUNKED + b"5\rhello\r\n0\r\n\r\n",
    "chunk, bare LF": CHUNKED + b"5\r\nhello\n0\r\n\r\n",
    "chunk without its end": CHUNKED + b"5\r\nhello0\r\n\r\n",
    "chunk longer than it says": CHUNKED + b"5\r\nhello, you\r\n0\r\n\r\n",
    "chunk extension, bare LF": CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "last chunk, bare LF": CHUNKED + b"0\n\n",
    "trailer with CL": CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n",
    "trailer folded": CHUNKED + b"0\r\nX: y\r\n z\r\n\r\n",
    # Lines
    "bare LF everywhere": b"POST /first HTTP/1.1\nHost: a\nContent-Length: 0\n\n",
    "bare LF after the request line": b"POST /first HTTP/1.1\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "bare LF after a field": HEAD + b"X: y\nContent-Length: 0\r\n\r\n",
    "bare LF at the end": HEAD + b"Content-Length: 0\r\n\n",
    "bare CR in a field": HEAD + b"X: y\rContent-Length: 0\r\n\r\n",
    "folded field": HEAD + b"X: y\r\n z\r\nContent-Length: 0\r\n\r\n",
    "folded CL": HEAD + b"Content-Length:\r\n 5\r\n\r\nhello",
    "folded first field": b"POST /first HTTP/1.1\r\n X: y\r\nHost: a\r\n\r\n",
    "space before the colon": HEAD + b"Content-Length : 5\r\n\r\nhello",
    "space before TE's colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "tab before the colon": HEAD + b"Content-Length\t: 5\r\n\r\nhello",
    "no colon": HEAD + b"Content-Length 5\r\n\r\nhello",
    "no name": HEAD + b": 5\r\n\r\n",
    "NUL in a value": HEAD + b"X: a\x00b\r\n\r\n",
    "NUL in a name": HEAD + b"X\x00Y: a\r\n\r\n",
    "control byte in a value": HEAD + b"X: a\x01b\r\n\r\n",
    "byte above ASCII in a name": HEAD + b"X\xe9: a\r\n\r\n",
    "NUL in the path": b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in the path": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    # Fields that may stand there once
    "no Host": b"POST /first HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "two Hosts": HEAD + b"Host: b\r\nContent-Length: 0\r\n\r\n",
    "two Hosts, spelled apart": HEAD + b"hOST: a\r\nContent-Length: 0\r\n\r\n",
    "two signatures": HEAD + b"X-Hub-Signature-256: a\r\nx-hub-signature-256: b\r\n\r\n",
    "two expectations": HEAD + b"Expect: 100-continue\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n",
    # Other protocols
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 by name": b"POST /first HTTP/2.0\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "HTTP/0.9": b"GET /first\r\n\r\n",
    "HTTP/0.9 by name": b"GET /first HTTP/0.9\r\nHost: a\r\n\r\n",
    "HTTP/1.2": b"GET /first HTTP/1.2\r\nHost: a\r\n\r\n",
    "HTTP/11": b"GET /first HTTP/11\r\nHost: a\r\n\r\n",
    "http in lower case": b"GET /first http/1.1\r\nHost: a\r\n\r\n",
    "method in lower case": b"post /first HTTP/1.1\r\nHost: a\r\n\r\n",
    "method not invented": b"FLY /first HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "CONNECT": b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
    "upgrade to WebSocket": b"GET /first HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\n\r\n",
    "upgrade of a POST": HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nhello",
}

TAKEN: dict[str, tuple[bytes, bytes]] = {
    "empty lines before": (b"\r\n\r\n" + post(b"x", path=b"/first"), b"x"),
    "CL with zeros in front": (HEAD + b"Content-Length: 0005\r\n\r\nhello", b"hello"),
    "no body": (HEAD + b"\r\n", b""),
    "chunked in capitals": (HEAD + b"Transfer-Encoding: CHUNKED\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "chunk size in capitals": (CHUNKED + b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    "chunk extension": (CHUNKED + b'5;a=b;c="d"\r\nhello\r\n0;e\r\n\r\n', b"hello"),
    "trailer": (CHUNKED + b"5\r\nhello\r\n0\r\nX-T: 1\r\n\r\n", b"hello"),
    "a request as a body": (post(SMUGGLED, path=b"/first"), SMUGGLED),
    "upgrade that nobody asked for": (HEAD + b"Upgrade: h2c\r\nContent-Length: 1\r\n\r\nx", b"x"),
}


WHOLE, BYTE_BY_BYTE = 1_000_000, 1


@each("case", REFUSED)
async def test_refused(case: str) -> None:
    data = REFUSED[case] + SMUGGLED
    async with listening() as edge:
        for step in (WHOLE, BYTE_BY_BYTE):
            async with edge.connect() as wire:
                for start in range(0, len(data), step):
                    try:
                        await wire.send(data[start : start + step])
                    except OSError:
                        break
                    if edge.listener.statistics.connections == 0 and start:
                        break
                answer = await wire.answer()
                assert answer.status == 400, answer
                assert answer.body.startswith(b'{"error":"bad_request","detail":"')
                assert answer.closes
                await wire.ended()
        assert edge.taker.seen == []
        await edge.is_alive()


@each("case", TAKEN)
async def test_taken(case: str) -> None:
    data, body = TAKEN[case]
    data += get(b"/next")
    async with listening() as edge:
        for step in (WHOLE, BYTE_BY_BYTE):
            async with edge.connect() as wire:
                for start in range(0, len(data), step):
                    await wire.send(data[start : start + step])
                assert [(await wire.answer()).body for _ in range(2)] == [b"/first", b"/next"]
                assert edge.taker.paths == [b"/first", b"/next"]
                assert edge.taker.seen[0].body == body
                edge.taker.seen.clear()


@each("case", ["CL and TE", "bare LF after a field", "chunk size a word", "CONNECT"])
async def test_what_came_before_is_answered_first(case: str) -> None:
    async with listening() as edge, edge.connect() as wire:
        edge.taker.hold = True
        await wire.send(post(path=b"/1"), chunked(b"x"), REFUSED[case], SMUGGLED)
        await edge.seen(2)
        for respond in reversed(edge.taker.held):
            respond(response())
        assert [(await wire.answer()).status for _ in range(3)] == [200, 200, 400]
        await wire.ended()
        assert len(edge.taker.seen) == 2
