"""Bounds what a quart-trio application does to hypercorn's connections: with the pair as it is (quart-trio
0.12, hypercorn 0.18) no connection is ever closed by the server.
"""

from __future__ import annotations

import trio
from hypercorn.typing import (
    ASGIFramework,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    ASGISendEvent,
    Scope,
)


def withhold_disconnects(app: ASGIFramework) -> ASGIFramework:
    """Wrap an application for `hypercorn.trio.serve`: it is not told `http.disconnect` any more once its
    answer has begun.

    hypercorn says that word also when an answer has been written, from within its own send; quart-trio
    then cancels its handler, and with it hypercorn's next step, which is to close the connection or to
    set its idle timer. A sender that hangs up before the answer still cancels its handler.
    """

    async def wrapped(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        answering = False

        async def guarded_receive() -> ASGIReceiveEvent:
            message = await receive()
            if message["type"] == "http.disconnect" and answering:
                await trio.sleep_forever()  # until the application has returned
            return message

        async def guarded_send(message: ASGISendEvent) -> None:
            nonlocal answering
            answering = True
            await send(message)

        await app(scope, guarded_receive, guarded_send)

    return wrapped
