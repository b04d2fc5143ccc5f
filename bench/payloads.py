"""Signed WhatsApp webhook requests as ready bytes, for the load generator and the cold-start probe.

The bodies are the simulator's. Nothing here sends anything.
"""

import base64
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from router.simulator import payloads, signature

BODY_SIZE = 600
WEBHOOK_PATH = "/webhooks/whatsapp"
DEFAULT_TEXTS = (
    "taxi",
    "menu",
    "insurance",
    "I need a ride to town",
    "job",
    "house to rent",
    "balance",
    "hello",
)

_FILLER = "Uwase Mukamana "


def new_run_tag() -> str:
    """Eight characters that keep the message ids of two runs apart."""
    return secrets.token_hex(4)


@dataclass(frozen=True)
class Population:
    """The phones that a run pretends to be: `senders` numbers, each of which always says the same text.

    Sender `i` says `texts[i % len(texts)]`, so a list of keywords splits the senders over services.
    `tag` makes the wamids of a run unique.
    """

    senders: int = 1_000
    texts: Sequence[str] = DEFAULT_TEXTS
    tag: str = field(default_factory=new_run_tag)
    phone_number_id: str = "106540352242922"
    size: int = BODY_SIZE

    def text_of(self, sender: int) -> str:
        return self.texts[sender % len(self.texts)]

    def wamid(self, index: int) -> str:
        raw = f"\x1d\x18\x0e{self.tag}{index:012d}\x15\x02\x00\x12".encode()
        return "wamid." + base64.b64encode(raw).decode()

    def bodies(self, count: int, first: int = 0) -> list[bytes]:
        """`count` text messages of exactly `size` bytes; message `i` comes from sender `i % senders`.

        Raises ValueError when a text is too long for the size.
        """
        # One encoded template per text; the parts that differ per message have a fixed length.
        templates = [self._template(text) for text in self.texts]
        bodies = []
        for index in range(first, first + count):
            sender = index % self.senders
            prefix, middle, suffix, rest = templates[sender % len(templates)]
            wa_id = f"250788{sender:06d}"
            body = f"{prefix}{wa_id}{middle}{wa_id}{suffix}{self.wamid(index)}{rest}"
            bodies.append(body.encode())
        return bodies

    def _template(self, text: str) -> tuple[str, str, str, str]:
        bare = self._encode(text, "")
        room = self.size - len(bare) + len("SENDER") * 2 + len("WAMID") - 12 * 2 - len(self.wamid(0))
        if room < 0:
            raise ValueError(f"the text {text!r} does not fit a body of {self.size} bytes")
        name = (_FILLER * (room // len(_FILLER) + 1))[:room]
        prefix, middle, tail = self._encode(text, name).split("SENDER")
        suffix, rest = tail.split("WAMID")
        return prefix, middle, suffix, rest

    def _encode(self, text: str, name: str) -> str:
        head = payloads.Head("WAMID", "SENDER", int(time.time()))
        change = payloads.change(
            self.phone_number_id,
            "250788000000",
            contacts=[payloads.contact(name, "SENDER")],
            messages=[payloads.text_message(head, text)],
        )
        return payloads.body(payloads.entry("102290129340398", change)).decode()


def request_bytes(body: bytes, secret: str, host: str, path: str = WEBHOOK_PATH) -> bytes:
    """One whole HTTP/1.1 request with the headers that Meta's webhooks carry."""
    head = (
        f"POST {path} HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        "User-Agent: facebookexternalua\r\n"
        "Accept: */*\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"X-Hub-Signature-256: {signature(secret, body)}\r\n"
        "\r\n"
    )
    return head.encode() + body
