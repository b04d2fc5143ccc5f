"""The port of services, as far as it is plain HTTP: POST /v1/messages sends one, GET /v1/messages/ID says
what became of it. Every route asks for the service's token before anything else; nothing here is hot.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, Final

import orjson
import trio

from actors.errors import JournalRefused, JournalUnavailable
from router.accept import JSON, Request, Respond, Response, is_correlation_id
from router.app import Router
from router.credentials import bearer_of, digest_of
from router.json_text import parse
from router.observe.logs import get_logger
from router.sending import NotSent, SentMessage

PATH: Final = b"/v1/messages"
MAX_BODY_BYTES: Final = 65_536
_AT_ONCE = 64  # requests that are being answered; more are told to come again

_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_FIELDS = frozenset({"to", "phone_number_id", "text", "message"})

_STATUSES: Final = {"no_sender": 503, "idempotency_key_reused": 422}  # of NotSent; the others are 400

_log = get_logger("postroom.messages")


class _Refusal(Exception):
    def __init__(self, status: int, code: str, detail: str, fields: bytes = b"") -> None:
        self.status = status
        self.code = code
        self.detail = detail
        self.fields = fields
        super().__init__(code)


class MessagesApi:
    """`credentials` gives the service by the SHA-256 of its token."""

    def __init__(self, router: Router, credentials: Callable[[], Mapping[str, str]]) -> None:
        self._router = router
        self._credentials = credentials
        self._prefix = os.urandom(6).hex()
        self._ids = count(1)
        self._answering = 0

    async def run(
        self, *, task_status: trio.TaskStatus[Callable[[Request, Respond], None]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Until cancelled; tells what takes requests."""
        async with trio.open_nursery() as nursery:

            def take(request: Request, respond: Respond) -> None:
                if self._answering >= _AT_ONCE:
                    refusal = _Refusal(
                        503, "busy", "too many requests at once, try again", b"Retry-After: 1\r\n"
                    )
                    respond(_refused(refusal, self._request_id()))
                    return
                self._answering += 1
                nursery.start_soon(self._answer, request, respond)

            task_status.started(take)
            await trio.sleep_forever()

    def _request_id(self) -> str:
        return f"{self._prefix}{next(self._ids):08x}"

    async def _answer(self, request: Request, respond: Respond) -> None:
        request_id = self._request_id()
        try:
            response = await self._respond(request, request_id)
        except _Refusal as refusal:
            response = _refused(refusal, request_id)
        except JournalRefused:
            wrong = _Refusal(400, "message", "the database does not take this message")
            response = _refused(wrong, request_id)
        except JournalUnavailable:
            away = _Refusal(503, "unavailable", "the database is away, send it again", b"Retry-After: 2\r\n")
            response = _refused(away, request_id)
        except Exception as error:  # an edge: one request's trouble must not be all others'
            _log.exception("a request failed", request_id=request_id, exc_info=error)
            response = _refused(_Refusal(500, "internal", "see the router's log"), request_id)
        finally:
            self._answering -= 1
        respond(response)

    async def _respond(self, request: Request, request_id: str) -> Response:
        service = self._service_of(request)
        if request.path == PATH:
            if request.method != b"POST":
                raise _Refusal(405, "method_not_allowed", "use POST", b"Allow: POST\r\n")
            return await self._send(service, request, request_id)
        identity = request.path.removeprefix(PATH + b"/")
        if identity == request.path:
            raise _Refusal(404, "not_found", "there is POST /v1/messages and GET /v1/messages/ID")
        if request.method != b"GET":
            raise _Refusal(405, "method_not_allowed", "use GET", b"Allow: GET\r\n")
        sent = await self._router.sent_message(service, identity.decode("latin-1"))
        if sent is None:
            raise _Refusal(404, "not_found", "this service sent no such message")
        return _answer_of(200, sent, request_id)

    def _service_of(self, request: Request) -> str:
        token = bearer_of(request.headers.get(b"authorization", b"").decode("latin-1"))
        service = self._credentials().get(digest_of(token)) if token else None
        if service is not None:
            return service
        raise _Refusal(401, "unauthorized", "show the service's token", b"WWW-Authenticate: Bearer\r\n")

    async def _send(self, service: str, request: Request, request_id: str) -> Response:
        key = request.headers.get(b"idempotency-key", b"")
        if not _KEY.fullmatch(key):
            detail = "Idempotency-Key: 1 to 255 printable characters without spaces, another for each message"
            raise _Refusal(400, "idempotency_key", detail)
        given = _parsed(request.body)
        asked = request.headers.get(b"x-correlation-id", b"").decode("latin-1")
        try:
            sent = await self._router.send(
                service,
                to=_text(given, "to"),
                phone_number_id=_text(given, "phone_number_id") if "phone_number_id" in given else None,
                message=_message(given),
                idempotency_key=key.decode("ascii"),
                correlation_id=asked if is_correlation_id(asked) else request_id,
            )
        except NotSent as error:
            raise _Refusal(_STATUSES.get(error.code, 400), error.code, str(error)) from None
        return _answer_of(202 if sent.created else 200, sent, request_id)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        given = parse(body)
    except ValueError:
        raise _Refusal(400, "body", "it is not JSON") from None
    if not isinstance(given, dict):
        raise _Refusal(400, "body", "it is not an object")
    unknown = sorted(given.keys() - _FIELDS)
    if unknown:
        raise _Refusal(400, "body", f"{unknown[0]!r:.60} is none of to, phone_number_id, text, message")
    return given


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value:
        raise _Refusal(400, name, f"{name} is not a text")
    return value


def _message(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if ("text" in given) == ("message" in given):
        raise _Refusal(400, "body", "it has either text or message")
    if "text" in given:
        return {"type": "text", "text": {"body": _text(given, "text")}}
    message = given["message"]
    if not isinstance(message, dict):
        raise _Refusal(400, "message", "message is not an object")
    return message


def _answer_of(status: int, sent: SentMessage, request_id: str) -> Response:
    body = {"id": sent.id, "status": sent.status}
    if sent.message_id is not None:
        body["message_id"] = sent.message_id
    if sent.error is not None:
        body["error"] = sent.error
    return Response(status, JSON, orjson.dumps(body), _fields(request_id))


def _refused(refusal: _Refusal, request_id: str) -> Response:
    body = orjson.dumps({"error": refusal.code, "detail": refusal.detail})
    return Response(refusal.status, JSON, body, _fields(request_id) + refusal.fields)


def _fields(request_id: str) -> bytes:
    return b"X-Request-ID: %s\r\n" % request_id.encode()
