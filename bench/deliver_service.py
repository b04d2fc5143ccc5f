"""The service of `bench deliver`: answers each POST with `{}` as fast as it can. Prints its port."""

import socket
import sys
from selectors import EVENT_READ, DefaultSelector

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
_LENGTH = b"content-length:"


def whole(received: bytearray) -> int:
    """The length of the first request in there, 0 when it is not whole."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return 0
    head = bytes(received[:end]).lower() + b"\r\n"
    at = head.index(_LENGTH) + len(_LENGTH)
    length = end + 4 + int(head[at : head.index(b"\r\n", at)])
    return length if len(received) >= length else 0


def main() -> None:
    """Until its standard input is closed, which ends it with whoever started it."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    selector = DefaultSelector()
    selector.register(listener, EVENT_READ)
    selector.register(sys.stdin, EVENT_READ)
    print(listener.getsockname()[1], flush=True)
    buffers: dict[socket.socket, bytearray] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                buffers[connection] = bytearray()
                selector.register(connection, EVENT_READ)
                continue
            assert isinstance(key.fileobj, socket.socket)
            received = buffers[key.fileobj]
            data = key.fileobj.recv(65_536)
            if not data:
                selector.unregister(key.fileobj)
                del buffers[key.fileobj]
                key.fileobj.close()
                continue
            received += data
            while length := whole(received):
                del received[:length]
                key.fileobj.sendall(_ANSWER)


if __name__ == "__main__":
    main()
