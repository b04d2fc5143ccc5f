"""The webhook as a Quart blueprint, for those who mount it in their own quart-trio app. The same
`accept` answers as behind the hot listener.
"""

from __future__ import annotations

import time

import trio
from quart import Blueprint, Response, request
from werkzeug.exceptions import RequestEntityTooLarge

from router.accept import JSON, Request, error_body
from router.accept import Response as Answer
from router.app import Router

_READ_ON_BYTES = 4_194_304  # of a body that is too large, so that its sender sees the answer and not a reset
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


def webhook_blueprint(router: Router) -> Blueprint:
    """A blueprint with every webhook path of `router`. Register it without a prefix:
    `app.register_blueprint(webhook_blueprint(router))`. On hypercorn, serve
    `router.edge.disconnects.withhold_disconnects(app)`, or it closes no connection by itself.
    """
    blueprint = Blueprint("postroom_webhooks", __name__)

    async def take() -> Response:
        started = time.perf_counter()
        limit = router.config.limits.body_max_bytes
        try:
            body = await _body_of_at_most(limit)
        except RequestEntityTooLarge:
            return _response(413, error_body("body_too_large", f"at most {limit} bytes"))
        except trio.TooSlowError:
            return _response(408, error_body("request_timeout", "the request took too long to arrive"))
        headers: dict[bytes, bytes] = {}
        for name, value in request.headers:
            key = name.lower().encode("latin-1")
            text = value.encode("latin-1", "replace")
            headers[key] = headers[key] + b", " + text if key in headers else text
        answered = trio.Event()
        answers: list[Answer] = []

        def respond(answer: Answer) -> None:
            answers.append(answer)
            answered.set()

        await router.webhooks.accept(
            Request(
                method=request.method.encode("ascii", "replace"),
                path=request.path.encode("utf-8"),
                query=request.query_string,
                headers=headers,
                body=body,
                started=started,
            ),
            respond,
        )
        # When the sender hangs up this handler is cancelled here; what was taken is stored all the same.
        await answered.wait()
        [answer] = answers
        response = _response(answer.status, answer.body, answer.content_type.decode())
        for field in answer.fields.decode("ascii").split("\r\n")[:-1]:
            name, _, value = field.partition(": ")
            response.headers[name] = value
        return response

    for number, path in enumerate(router.webhooks.paths):
        blueprint.add_url_rule(
            path, f"webhook_{number}", take, methods=_METHODS, provide_automatic_options=False
        )
    return blueprint


async def _body_of_at_most(limit: int) -> bytes:
    """Read as it comes: Quart's own limit is fixed before a handler runs.

    Raises:
        RequestEntityTooLarge: it is larger, or larger than the app allows.
        trio.TooSlowError: it took longer than the app's BODY_TIMEOUT.
    """
    if (request.content_length or 0) > limit + _READ_ON_BYTES:
        raise RequestEntityTooLarge
    body = bytearray()
    size = 0
    with trio.fail_after(request.body_timeout or float("inf")):
        async for piece in request.body:
            size += len(piece)
            if size <= limit:
                body += piece
            elif size > limit + _READ_ON_BYTES:
                break
    if size > limit:
        raise RequestEntityTooLarge
    return bytes(body)


def _response(status: int, body: bytes, content_type: str = JSON.decode()) -> Response:
    return Response(body, status=status, content_type=content_type)
