"""The Graph API as a sender sees it: an HTTP endpoint on loopback that takes messages and fails as told.

What a request means is decided in graph_messages.py, how it is read in requests.py.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from random import Random

import trio

from router.simulator import payloads
from router.simulator.graph_messages import (
    PAIR_LIMIT,
    RATE_LIMIT,
    SOMETHING_WRONG,
    UNDELIVERABLE,
    UNKNOWN_PATH,
    WRONG_TOKEN,
    Asked,
    GraphError,
    asked,
    sending_number,
)
from router.simulator.payloads import Json
from router.simulator.requests import BadRequest, Request, RequestReader, answer_bytes

HOST = "127.0.0.1"
VERSION = "v23.0"


@dataclass(frozen=True)
class GraphFaults:
    """Shares between 0 and 1 of the messages that would be taken otherwise; each is drawn by itself.

    `error` answers 500 with code 131000, `limited` 429 with 130429, `pair_limited` 400 with 131056, `refused`
    400 with 131026, which is for good. `drop_before` closes the connection and takes nothing, `drop_after`
    takes the message and closes without an answer, `slow` takes it and answers `slow_seconds` later.
    """

    error: float = 0.0
    limited: float = 0.0
    pair_limited: float = 0.0
    refused: float = 0.0
    drop_before: float = 0.0
    drop_after: float = 0.0
    slow: float = 0.0
    slow_seconds: float = 1.0

    def __post_init__(self) -> None:
        shares = [getattr(self, one.name) for one in fields(self) if one.name != "slow_seconds"]
        if not all(0.0 <= share <= 1.0 for share in shares) or self.slow_seconds < 0:
            raise ValueError("a fault is a share between 0 and 1, and slow_seconds not negative")


@dataclass(frozen=True)
class Taken:
    """A message that the endpoint took under the wamid `message_id`.

    `recipient` is a phone number in digits or a business-scoped user id. `message` is the JSON object without
    `messaging_product`, `to` and `recipient`; `text` the body of a text message, else empty; `callback_data`
    its `biz_opaque_callback_data`.
    """

    phone_number_id: str
    recipient: str = field(repr=False)
    message: Json = field(repr=False)
    text: str = field(repr=False)
    message_id: str = field(repr=False)
    callback_data: str | None


@dataclass(frozen=True)
class Refused:
    """A request that was answered with an error. With a wrong token, or no message in it, it is empty."""

    phone_number_id: str
    recipient: str = field(repr=False)
    message: Json = field(repr=False)
    text: str = field(repr=False)
    callback_data: str | None
    status: int
    code: int

    @property
    def for_good(self) -> bool:
        """Whether sending the same again could not help: the message itself is wrong, or undeliverable."""
        return self.status == 400 and self.code != PAIR_LIMIT.code


def _ignore(_: object) -> None:
    pass


class GraphEndpoint:
    """Answers `POST {url}/{phone_number_id}/messages` with `Authorization: Bearer {token}`.

    Runs as `url = await nursery.start(graph.serve)` until it is cancelled. Messages are handed to `on_taken`
    in the order in which they are taken, refused ones likewise to `on_refused`; `on_in_doubt` gets those of
    the taken whose sender may not have heard of it, so that it may send them again. `faults` and `down` can
    be changed while it runs. At most `max_connections` are open, what comes beyond is closed.

    `port` 0 leaves the choice to the system. Equal `rng`s and requests give equal answers.
    """

    def __init__(
        self,
        *,
        token: str,
        rng: Random,
        on_taken: Callable[[Taken], None],
        on_refused: Callable[[Refused], None] = _ignore,
        on_in_doubt: Callable[[Taken], None] = _ignore,
        faults: GraphFaults | None = None,
        port: int = 0,
        max_connections: int = 256,
    ) -> None:
        self.faults = faults or GraphFaults()
        self._authorization = f"Bearer {token}".encode()
        self._rng = rng
        self._on_taken = on_taken
        self._on_refused = on_refused
        self._on_in_doubt = on_in_doubt
        self._port = port
        self._listening = False
        self._max_connections = max_connections
        self._open: set[trio.CancelScope] = set()
        self._down = False

    @property
    def url(self) -> str:
        """What a sender is configured with: `http://127.0.0.1:PORT/v23.0`.

        Raises:
            RuntimeError: `serve` has not begun to listen.
        """
        if not self._listening:
            raise RuntimeError("the endpoint has no URL before it listens")
        return f"http://{HOST}:{self._port}/{VERSION}"

    @property
    def down(self) -> bool:
        """While True every connection is closed at once, the open ones too."""
        return self._down

    @down.setter
    def down(self, down: bool) -> None:
        self._down = down
        if down:
            for scope in self._open:
                scope.cancel()

    async def serve(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; it is started with its `url`.

        Raises:
            OSError: the port is taken.
        """
        (listener,) = await trio.open_tcp_listeners(self._port, host=HOST)
        self._port = listener.socket.getsockname()[1]
        self._listening = True
        task_status.started(self.url)
        await trio.serve_listeners(self._connection, [listener])

    async def _connection(self, stream: trio.SocketStream) -> None:
        if self._down or len(self._open) >= self._max_connections:
            stream.socket.close()
            return
        with trio.CancelScope() as scope:
            self._open.add(scope)
            try:
                await self._requests(stream)
            except (BadRequest, trio.BrokenResourceError):
                pass
            finally:
                self._open.discard(scope)
                stream.socket.close()

    async def _requests(self, stream: trio.SocketStream) -> None:
        reader = RequestReader(stream)
        keep = True
        while keep and (request := await reader.next()) is not None:
            keep = await self._answer(stream, request) and request.keeps_alive

    async def _answer(self, stream: trio.SocketStream, request: Request) -> bool:
        """Whether the connection may be kept."""
        close = not request.keeps_alive
        judged = self._judge(request)
        if isinstance(judged, GraphError):
            await stream.send_all(answer_bytes(judged.status, judged.answer(self._rng), close=close))
            return True
        faults = self.faults
        if self._strikes(faults.drop_before):
            return False
        refusal = self._refusal(faults)
        if refusal is not None:
            self._on_refused(_refused(judged, refusal))
            await stream.send_all(answer_bytes(refusal.status, refusal.answer(self._rng), close=close))
            return True
        slow, dropped = self._strikes(faults.slow), self._strikes(faults.drop_after)
        taken = self._take(judged)
        heard = False
        try:
            if slow:
                await trio.sleep(faults.slow_seconds)
            if dropped:
                return False
            await stream.send_all(answer_bytes(200, _acceptance(judged, taken.message_id), close=close))
            heard = not slow  # whose answer was late may have left before it came
            return True
        finally:
            if not heard:
                self._on_in_doubt(taken)

    def _judge(self, request: Request) -> Asked | GraphError:
        number = sending_number(request.target)
        if number is None or request.method != "POST":
            return UNKNOWN_PATH
        given = request.headers.get("authorization", "").encode("latin-1")
        trusted = hmac.compare_digest(given, self._authorization)
        judged = asked(number, request.body) if trusted else WRONG_TOKEN
        if isinstance(judged, GraphError):
            self._on_refused(Refused(number, "", {}, "", None, judged.status, judged.code))
        return judged

    def _refusal(self, faults: GraphFaults) -> GraphError | None:
        shares = (
            (faults.error, SOMETHING_WRONG),
            (faults.limited, RATE_LIMIT),
            (faults.pair_limited, PAIR_LIMIT),
            (faults.refused, UNDELIVERABLE),
        )
        return next((error for share, error in shares if self._strikes(share)), None)

    def _take(self, judged: Asked) -> Taken:
        message_id = payloads.wamid(judged.recipient, self._rng, outbound=True)
        number, recipient = judged.phone_number_id, judged.recipient
        taken = Taken(number, recipient, judged.message, judged.text, message_id, judged.callback_data)
        self._on_taken(taken)
        return taken

    def _strikes(self, share: float) -> bool:
        return share > 0.0 and self._rng.random() < share


def _refused(judged: Asked, error: GraphError) -> Refused:
    number, recipient, message = judged.phone_number_id, judged.recipient, judged.message
    return Refused(number, recipient, message, judged.text, judged.callback_data, error.status, error.code)


def _acceptance(judged: Asked, message_id: str) -> Json:
    known = "wa_id" if judged.is_phone else "user_id"
    return {
        "messaging_product": "whatsapp",
        "contacts": [{"input": judged.recipient, known: judged.recipient}],
        "messages": [{"id": message_id}],
    }
