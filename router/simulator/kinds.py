"""One message of any kind that the contract knows, and of kinds that nobody has invented yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random

from router.simulator import payloads
from router.simulator.payloads import Head, Json

Write = Callable[[Head, Random, str, str], Json]
"""(head, rng, words for a body, caption or title, id of an earlier message) -> message"""

KINDS: Mapping[str, Write] = {
    "text": lambda head, rng, words, earlier: payloads.text_message(head, words),
    "image": lambda head, rng, words, earlier: payloads.image_message(head, rng, words),
    "bare image": lambda head, rng, words, earlier: payloads.image_message(head, rng),
    "voice": lambda head, rng, words, earlier: payloads.audio_message(head, rng),
    "audio": lambda head, rng, words, earlier: payloads.audio_message(head, rng, voice=False),
    "video": lambda head, rng, words, earlier: payloads.video_message(head, rng, words),
    "document": lambda head, rng, words, earlier: payloads.document_message(head, rng, "a.pdf", words),
    "sticker": lambda head, rng, words, earlier: payloads.sticker_message(head, rng, animated=True),
    "location": lambda head, rng, words, earlier: payloads.location_message(head, -1.9441, 30.0619, "Kigali"),
    "contacts": lambda head, rng, words, earlier: payloads.contacts_message(head, "Ada", "999000000000"),
    "reaction": lambda head, rng, words, earlier: payloads.reaction_message(head, earlier, "👍"),
    "reaction taken back": lambda head, rng, words, earlier: payloads.reaction_message(head, earlier, None),
    "button reply": lambda head, rng, words, earlier: payloads.button_reply_message(head, "choice-x", words),
    "list reply": lambda head, rng, words, earlier: payloads.list_reply_message(head, "row-x", words),
    "flow": lambda head, rng, words, earlier: payloads.nfm_reply_message(head, {"words": words}),
    "template button": lambda head, rng, words, earlier: payloads.button_message(head, "pressed-x", words),
    "order": lambda head, rng, words, earlier: payloads.order_message(head, "7", [("sku", 2, 1.5)], "RWF"),
    "system": lambda head, rng, words, earlier: payloads.system_message(head, f"999{rng.randrange(10**9)}"),
    "request welcome": lambda head, rng, words, earlier: payloads.request_welcome_message(head),
    "unsupported": lambda head, rng, words, earlier: payloads.unsupported_message(head),
    "edit": lambda head, rng, words, earlier: payloads.edit_message(head, earlier, words),
    "revoke": lambda head, rng, words, earlier: payloads.revoke_message(head, earlier),
    "hologram": lambda head, rng, words, earlier: payloads.future_message(head),
    "scent": lambda head, rng, words, earlier: payloads.future_message(head, "scent"),
}


def any_kind(head: Head, rng: Random, words: str, earlier: str) -> Json:
    """A message of a kind drawn evenly from `KINDS`; a few are replies, forwards, or come from an ad.

    `words` must tell it from others of its phone, where the kind has any; `earlier` is the id of another
    message of the phone.
    """
    draw = rng.random()
    if draw < 0.1:
        head = replace(head, context={"id": earlier, **({"from": head.sender} if head.sender else {})})
    elif draw < 0.15:
        head = replace(head, context={"forwarded": True, "frequently_forwarded": draw < 0.12})
    elif draw < 0.2:
        head = replace(head, referral={"source_type": "ad", "source_id": "23", "headline": "Ride with us"})
    return KINDS[rng.choice(tuple(KINDS))](head, rng, words, earlier)
