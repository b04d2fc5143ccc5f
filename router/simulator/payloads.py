"""Builders for webhook bodies as Meta writes them, from one message up to the encoded bytes.

Field names are those of Meta's Cloud API webhook reference. What is sent, when and by whom is not decided
here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

Json = dict[str, object]

CHARGED_STATUSES = frozenset({"sent", "delivered", "read"})
"""The statuses that name a conversation and its pricing."""


@dataclass(frozen=True)
class Head:
    """What every message carries, whatever its type.

    `timestamp` is in Unix seconds. One of `sender` (a phone number in digits, Meta's `from`) and `user_id`
    (a business-scoped id, Meta's `from_user_id`) may be None. `context` marks a reply or a forward,
    `referral` a click on an ad.
    """

    id: str
    sender: str | None
    timestamp: int
    user_id: str | None = None
    group_id: str | None = None
    context: Mapping[str, object] | None = None
    referral: Mapping[str, object] | None = None


def wamid(phone_number: str, rng: Random, *, outbound: bool = False) -> str:
    """A new message id: `wamid.` and base64 of bytes that hold the phone number and 128 random bits.

    The layout is that of ids seen in real bodies: tagged, length-prefixed fields.
    """
    number = phone_number.encode("ascii")
    unique = f"{rng.getrandbits(128):032X}".encode("ascii")
    direction = b"\x11" if outbound else b"\x12"
    packed = b"\x1c\x18" + bytes([len(number)]) + number + b"\x15\x02\x00" + direction
    packed += b"\x18" + bytes([len(unique)]) + unique + b"\x00"
    return "wamid." + base64.b64encode(packed).decode("ascii")


def media(rng: Random, mime_type: str, **more: object) -> Json:
    """What stands under `image`, `audio`, `video` ...; `more` adds caption, filename, voice, animated."""
    digest = base64.b64encode(rng.randbytes(32)).decode("ascii")
    return {**more, "mime_type": mime_type, "sha256": digest, "id": str(rng.randrange(10**14, 10**16))}


def message(head: Head, type: str, content: Mapping[str, object]) -> Json:
    """A message of any type; `content` is added to the common fields, usually under one key, the type."""
    written: Json = {}
    if head.context is not None:
        written["context"] = dict(head.context)
    if head.sender is not None:
        written["from"] = head.sender
    if head.user_id is not None:
        written["from_user_id"] = head.user_id
    if head.group_id is not None:
        written["group_id"] = head.group_id
    written |= {"id": head.id, "timestamp": str(head.timestamp)}
    if head.referral is not None:
        written["referral"] = dict(head.referral)
    return written | dict(content) | {"type": type}


def text_message(head: Head, text: str) -> Json:
    return message(head, "text", {"text": {"body": text}})


def image_message(head: Head, rng: Random, caption: str | None = None) -> Json:
    return message(head, "image", {"image": media(rng, "image/jpeg", **_given(caption=caption))})


def audio_message(head: Head, rng: Random, *, voice: bool = True) -> Json:
    return message(head, "audio", {"audio": media(rng, "audio/ogg; codecs=opus", voice=voice)})


def video_message(head: Head, rng: Random, caption: str | None = None) -> Json:
    return message(head, "video", {"video": media(rng, "video/mp4", **_given(caption=caption))})


def document_message(head: Head, rng: Random, filename: str, caption: str | None = None) -> Json:
    document = media(rng, "application/pdf", filename=filename, **_given(caption=caption))
    return message(head, "document", {"document": document})


def sticker_message(head: Head, rng: Random, *, animated: bool = False) -> Json:
    return message(head, "sticker", {"sticker": media(rng, "image/webp", animated=animated)})


def location_message(head: Head, latitude: float, longitude: float, name: str | None = None) -> Json:
    """Coordinates are in decimal degrees; only a named place has a `name`."""
    place = {"latitude": latitude, "longitude": longitude, **_given(name=name)}
    return message(head, "location", {"location": place})


def contacts_message(head: Head, name: str, phone_number: str) -> Json:
    card = {
        "name": {"formatted_name": name, "first_name": name},
        "phones": [{"phone": f"+{phone_number}", "wa_id": phone_number, "type": "CELL"}],
    }
    return message(head, "contacts", {"contacts": [card]})


def reaction_message(head: Head, message_id: str, emoji: str | None) -> Json:
    """Without an emoji the reaction to `message_id` is taken back."""
    return message(head, "reaction", {"reaction": {"message_id": message_id, **_given(emoji=emoji)}})


def button_reply_message(head: Head, reply_id: str, title: str) -> Json:
    return _interactive(head, "button_reply", {"id": reply_id, "title": title})


def list_reply_message(head: Head, row_id: str, title: str, description: str | None = None) -> Json:
    return _interactive(head, "list_reply", {"id": row_id, "title": title, **_given(description=description)})


def nfm_reply_message(head: Head, response: Mapping[str, object], name: str = "flow") -> Json:
    """The answer of a flow; `response` travels as JSON inside a string."""
    reply = {"name": name, "body": "Sent", "response_json": json.dumps(response)}
    return _interactive(head, "nfm_reply", reply)


def button_message(head: Head, payload: str, text: str) -> Json:
    """A quick-reply button of a template."""
    return message(head, "button", {"button": {"payload": payload, "text": text}})


def order_message(
    head: Head, catalog_id: str, items: Sequence[tuple[str, int, float]], currency: str
) -> Json:
    """`items` are (product_retailer_id, quantity, price of one in `currency`, an ISO 4217 code)."""
    products = [
        {"product_retailer_id": product, "quantity": quantity, "item_price": price, "currency": currency}
        for product, quantity, price in items
    ]
    order = {"catalog_id": catalog_id, "text": "", "product_items": products}
    return message(head, "order", {"order": order})


def system_message(head: Head, new_wa_id: str) -> Json:
    """The sender's number became `new_wa_id`."""
    change_of_number = {
        "body": f"User changed from {head.sender} to {new_wa_id}",
        "wa_id": new_wa_id,
        "type": "user_changed_number",
    }
    return message(head, "system", {"system": change_of_number})


def request_welcome_message(head: Head) -> Json:
    return message(head, "request_welcome", {})


def unsupported_message(head: Head) -> Json:
    """What Meta sends for a message that it does not carry itself, with its error 131051."""
    reason = error(131051, "Message type unknown", "Message type is currently not supported.")
    return message(head, "unsupported", {"errors": [reason]})


def edit_message(head: Head, original_id: str, text: str) -> Json:
    edited = {"type": "text", "text": {"body": text}}
    return message(head, "edit", {"edit": {"original_message_id": original_id, "message": edited}})


def revoke_message(head: Head, original_id: str) -> Json:
    return message(head, "revoke", {"revoke": {"original_message_id": original_id}})


def future_message(head: Head, type: str = "hologram") -> Json:
    """A type that nobody has documented, with content of a shape that nobody expects."""
    return message(head, type, {type: {"frames": [1, 2.5, None, {"depth": []}], "loop": True}})


def text_of(message: Mapping[str, object]) -> str:
    """What a person reads in a message of any type: its body, its caption or its title; empty without one."""
    kind = message.get("type")
    content = message.get(kind) if isinstance(kind, str) else None
    if isinstance(content, Mapping) and kind == "interactive":
        content = content.get(content.get("type"))
    if not isinstance(content, Mapping):
        return ""
    words = (content.get(name) for name in ("body", "caption", "title", "text"))
    return next((word for word in words if isinstance(word, str)), "")


def error(code: int, title: str, details: str) -> Json:
    return {"code": code, "title": title, "message": title, "error_data": {"details": details}}


def status(
    message_id: str,
    name: str,
    timestamp: int,
    recipient: str | None,
    *,
    user_id: str | None = None,
    errors: Sequence[Json] = (),
) -> Json:
    """A status `name` (sent, delivered, read, failed ...) of the outbound `message_id`; Unix seconds."""
    written: Json = {"id": message_id, "status": name, "timestamp": str(timestamp)}
    written |= _given(recipient_id=recipient, recipient_user_id=user_id)
    if name in CHARGED_STATUSES:
        conversation = base64.b16encode(message_id[-16:].encode("ascii")).decode("ascii").lower()
        written["conversation"] = {"id": conversation, "origin": {"type": "service"}}
        written["pricing"] = {"billable": True, "pricing_model": "CBP", "category": "service"}
    if errors:
        written["errors"] = list(errors)
    return written


def contact(name: str, wa_id: str | None, user_id: str | None = None) -> Json:
    return {"profile": {"name": name}, **_given(wa_id=wa_id, user_id=user_id)}


def change(
    phone_number_id: str,
    display_number: str,
    *,
    messages: Sequence[object] = (),
    contacts: Sequence[Json] = (),
    statuses: Sequence[object] = (),
    errors: Sequence[Json] = (),
) -> Json:
    """A change of the field `messages` for one business number; empty lists are left out, as Meta does.

    Malformed messages and statuses may be anything that JSON can say.
    """
    value: Json = {
        "messaging_product": "whatsapp",
        "metadata": {"display_phone_number": display_number, "phone_number_id": phone_number_id},
    }
    listed: dict[str, Sequence[object]] = {
        "contacts": contacts,
        "messages": messages,
        "statuses": statuses,
        "errors": errors,
    }
    value |= {name: list(items) for name, items in listed.items() if items}
    return {"value": value, "field": "messages"}


def other_change(field: str, value: Mapping[str, object]) -> Json:
    """A change of any other field: template, account, phone number, security, calls ..."""
    return {"value": dict(value), "field": field}


def entry(waba_id: str, *changes: Json) -> Json:
    return {"id": waba_id, "changes": list(changes)}


def body(*entries: Json) -> bytes:
    """The bytes of one webhook: no white space, and everything outside ASCII written as `\\uXXXX`."""
    written = {"object": "whatsapp_business_account", "entry": list(entries)}
    return json.dumps(written, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def _interactive(head: Head, type: str, reply: Mapping[str, object]) -> Json:
    return message(head, "interactive", {"interactive": {"type": type, type: dict(reply)}})


def _given(**fields: object) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
