"""What the Graph API makes of one request to send a message: pure, from the bytes to the message or error.

Error codes and forms are those of Meta's Cloud API error reference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from router.simulator.payloads import Json

MAX_TEXT = 4096
"""Characters in the body of a text message (Cloud API, text messages)."""

UNREADABLE = 100
BAD_TOKEN = 190

_PATH = re.compile(r"/v\d+\.\d+/(\d{1,32})/messages", re.ASCII)
_PHONE = re.compile(r"\+?(\d{1,32})", re.ASCII)
_USER_ID = re.compile(r"(?!\d+$)[!-~]{1,128}", re.ASCII)
_NOT_CONTENT = frozenset({"messaging_product", "to", "recipient"})


@dataclass(frozen=True)
class GraphError:
    """One error of the Graph API; `status` is the HTTP status that it comes with."""

    status: int
    code: int
    message: str
    details: str

    def answer(self, rng: Random) -> Json:
        trace = f"A{rng.getrandbits(64):016x}"
        data = {"messaging_product": "whatsapp", "details": self.details}
        written = {"message": f"(#{self.code}) {self.message}", "type": "OAuthException", "code": self.code}
        return {"error": {**written, "error_data": data, "fbtrace_id": trace}}


WRONG_TOKEN = GraphError(401, BAD_TOKEN, "Invalid OAuth access token", "The token is missing or wrong.")
UNKNOWN_PATH = GraphError(404, UNREADABLE, "Unknown path components", "There is nothing at this path.")
SOMETHING_WRONG = GraphError(500, 131000, "Something went wrong", "An unknown error happened.")
RATE_LIMIT = GraphError(429, 130429, "Rate limit hit", "Cloud API message throughput has been reached.")
PAIR_LIMIT = GraphError(400, 131056, "Pair rate limit hit", "Too many messages to this recipient.")
UNDELIVERABLE = GraphError(400, 131026, "Message undeliverable", "This message cannot be delivered.")


@dataclass(frozen=True)
class Asked:
    """A message that may be sent. `recipient` is a phone number in digits (`is_phone`) or a user id;
    `message` is the JSON object without `messaging_product`, `to` and `recipient`.
    """

    phone_number_id: str
    recipient: str = field(repr=False)
    is_phone: bool
    message: Json = field(repr=False)

    @property
    def text(self) -> str:
        """The body of a text message, else the empty string."""
        content = self.message["text"] if self.message["type"] == "text" else None
        return str(content["body"]) if isinstance(content, dict) else ""

    @property
    def callback_data(self) -> str | None:
        data = self.message.get("biz_opaque_callback_data")
        return data if isinstance(data, str) else None


def sending_number(target: str) -> str | None:
    """The phone_number_id in `/{version}/{phone_number_id}/messages`; None for any other path."""
    found = _PATH.fullmatch(target)
    return found[1] if found else None


def asked(phone_number_id: str, body: bytes) -> Asked | GraphError:
    """What `body` asks `phone_number_id` to send."""
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        return _unreadable("The body is no JSON.")
    if not isinstance(read, dict):
        return _unreadable("The body is no JSON object.")
    if read.get("messaging_product") != "whatsapp":
        return _unreadable("messaging_product must be whatsapp.")
    to, user_id = read.get("to"), read.get("recipient")
    if (to is None) == (user_id is None):
        return _unreadable("Exactly one of to and recipient is needed.")
    phone = _PHONE.fullmatch(to) if isinstance(to, str) else None
    named = _USER_ID.fullmatch(user_id) if isinstance(user_id, str) else None
    if phone is None and named is None:
        return _unreadable("to must be a phone number, recipient a user id.")
    wrong = _wrong_content(read)
    if wrong is not None:
        return _unreadable(wrong)
    message = {name: value for name, value in read.items() if name not in _NOT_CONTENT}
    recipient = phone[1] if phone is not None else str(user_id)
    return Asked(phone_number_id, recipient, phone is not None, message)


def _wrong_content(read: Mapping[str, object]) -> str | None:
    kind = read.get("type")
    if not isinstance(kind, str) or kind in _NOT_CONTENT:
        return "type must name the kind of message."
    content = read.get(kind)
    if not isinstance(content, list if kind == "contacts" else dict):
        return f"{kind[:40]} must hold the message."
    if kind == "text" and isinstance(content, dict):
        body = content.get("body")
        if not isinstance(body, str) or not 0 < len(body) <= MAX_TEXT:
            return f"text.body must have 1 to {MAX_TEXT} characters."
    return None


def _unreadable(details: str) -> GraphError:
    return GraphError(400, UNREADABLE, "Invalid parameter", details)
