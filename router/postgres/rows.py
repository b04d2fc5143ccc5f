"""Turns flushes and completions into the arrays of one statement each, and rows back into items. Pure."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from actors.messages import Bucket, Completion, Delivery, Incoming, Item, Session
from router.channels import bodies
from router.json_text import parse, storable

_REFERENCE = "rpl_"
_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def flush_arguments(deliveries: Sequence[Delivery]) -> list[Any]:
    """postroom_append's arguments from p_malformed on; where items are of erased persons, those of
    postroom_append_erased, which takes their number as well: one argument more."""
    events: list[tuple[Any, ...]] = []
    items: list[tuple[Any, ...]] = []
    furthest: dict[tuple[str, str], Incoming] = {}
    malformed = handled = erased = 0
    for number, delivery in enumerate(deliveries, 1):
        events.append(
            (delivery.app, delivery.correlation_id, delivery.traceparent, delivery.partial, delivery.body)
        )
        for item in delivery.items:
            bucket = item.bucket
            names: tuple[str, ...] = ()
            if bucket is None:
                names = item.names
            elif bucket is Bucket.MALFORMED:
                malformed += 1
            elif bucket is Bucket.ERASED:
                erased += 1
            else:
                handled += 1
                if item.status is not None:
                    _keep_furthest(furthest, item)
            items.append(
                (
                    number,
                    item.key,
                    item.deduplicated,
                    item.kind,
                    item.path,
                    item.message_id,
                    item.phone_number_id,
                    names[0] if names else None,
                    names[1] if len(names) > 1 else None,
                    item.type,
                    bucket,
                    item.reason,
                )
            )
    arguments = [malformed, handled, events, items, *_statuses(furthest)]
    return [*arguments, erased] if erased else arguments


def _keep_furthest(furthest: dict[tuple[str, str], Incoming], item: Incoming) -> None:
    assert item.status is not None
    named = (item.phone_number_id or "", item.message_id or "")
    known = furthest.get(named)
    if known is None or known.status is None or known.status.rank < item.status.rank:
        furthest[named] = item


def _statuses(furthest: Mapping[tuple[str, str], Incoming]) -> list[list[Any]]:
    columns: list[list[Any]] = [[], [], [], [], []]
    for (number, message_id), item in sorted(furthest.items()):
        status = item.status
        if status is not None:
            stamp = status.timestamp
            at = None if stamp is None else _UNIX_EPOCH + timedelta(seconds=stamp)
            for column, value in zip(
                columns, (number, message_id, status.status, status.rank, at), strict=True
            ):
                column.append(value)
    return columns


def items_of(rows: Iterable[Any]) -> list[Item]:
    """Items from the rows of `tail` or `read`. One whose bytes are gone is left out."""
    items: list[Item] = []
    documents: dict[int, Any] = {}
    for row in rows:
        event_id = row["event_id"]
        if row["body"] is None or row["session_key"] is None:
            continue
        if event_id not in documents:
            documents[event_id] = parse(row["body"])
        try:
            message, contact = bodies.item_at(documents[event_id], row["path"])
        except LookupError:
            continue
        items.append(replace(_item(row, message, contact), joins=row["joins"]))
    return items


def replay_of(row: Any) -> Item:
    """A claimed dead letter as its session takes it: the message from its stored bytes; from the letter when
    it was edited, or when the bytes are gone. What somebody put there by hand and cannot be read is empty.
    """
    stored: Mapping[str, Any] = {}
    kept: Any = None
    contact: Mapping[str, Any] | None = None
    if row["body"] is not None:
        with suppress(LookupError):
            stored, contact = bodies.item_at(parse(row["body"]), row["path"])
    if row["revision"] or not stored:
        with suppress(ValueError):
            kept = parse(row["payload"].encode())
    message = kept if isinstance(kept, dict) else stored
    item = _item(row, message, contact)
    # Who is answered is who wrote, whatever an edit says.
    wa_id, user_id = bodies.sender(stored or ({} if row["revision"] else message), contact)
    return replace(
        item,
        wa_id=wa_id if wa_id or user_id else row["phone_number"],
        user_id=user_id,
        redelivered=row["attempts"] > 0,
        dead_letter=str(row["id"]),
        domain=row["service"],
        revision=row["revision"],
        retries=row["retry_count"],
        deferred=row["resolution"] == "deferred",
        overtaken=not row["keeps_order"],
    )


def _item(row: Any, message: Mapping[str, Any], contact: Mapping[str, Any] | None) -> Item:
    wa_id, user_id = bodies.sender(message, contact)
    return Item(
        seq=row["seq"],
        key=f"msg_{row['key'].hex()}",
        message_id=row["message_id"],
        session_key=row["session_key"],
        phone_number_id=row["phone_number_id"],
        wa_id=wa_id,
        user_id=user_id,
        received_at=row["received_at"],
        correlation_id=row["correlation_id"],
        traceparent=row["traceparent"],
        message=message,
        contact=contact,
    )


def session_of(row: Any) -> Session:
    """A stored session."""
    return Session(
        key=row["session_key"],
        phone_number_id=row["phone_number_id"],
        wa_id=row["wa_id"],
        user_id=row["user_id"],
        active_service=row["active_service"],
        state=orjson.loads(row["state"]),
        version=row["version"],
    )


def reference_of(identity: int) -> str:
    """What a row of the outbox is called outside: the channel gives it back with each status."""
    return f"{_REFERENCE}{identity}"


def identity_of(reference: str) -> int | None:
    """The row that is called so; None: there can be none."""
    digits = reference.removeprefix(_REFERENCE)
    is_one = digits != reference and re.fullmatch(r"[1-9][0-9]{0,17}", digits, re.ASCII) is not None
    return int(digits) if is_one else None


def text(value: str) -> str:
    """Text that Postgres takes."""
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def completion_arguments(completions: Sequence[Completion], now: datetime, reply_status: str) -> list[Any]:
    """postroom_complete's arguments from p_done on. Of several changes of a session the last one counts; of
    an item that is there twice, as one that was delivered again after a crash in here, the first.
    """
    done: list[tuple[Any, ...]] = []
    replies: list[tuple[Any, ...]] = []
    letters: list[tuple[Any, ...]] = []
    sessions: dict[str, Session] = {}
    seen: set[int] = set()
    for completion in completions:
        item = completion.item
        if item.seq in seen:
            continue
        seen.add(item.seq)
        done.append(
            (
                item.seq,
                item.received_at,
                completion.place,
                completion.service,
                completion.rule,
                completion.attempts,
                completion.unreadable_answer,
            )
        )
        if completion.session is not None:
            sessions[item.session_key] = completion.session
        for ordinal, reply in enumerate(completion.replies, 1):
            replies.append(
                (
                    item.seq,
                    ordinal,
                    item.session_key,
                    item.phone_number_id,
                    item.wa_id or item.user_id,
                    completion.service,
                    storable(reply),
                    item.correlation_id,
                )
            )
        letter = completion.dead_letter
        if letter is not None:
            due = None if letter.retry_in is None else now + timedelta(seconds=letter.retry_in)
            letters.append(
                (
                    item.seq,
                    item.received_at,
                    item.wa_id or item.user_id,
                    completion.service or "",
                    storable(item.message),
                    text(letter.error),
                    letter.status,
                    letter.resolution,
                    due,
                    item.message_id,
                    item.session_key,
                    completion.attempts,
                    item.correlation_id,
                    letter.keeps_order,
                )
            )
    changes = [session_arguments(key, session) for key, session in sorted(sessions.items())]
    return [done, changes, replies, reply_status, letters]


def session_arguments(key: str, session: Session) -> tuple[Any, ...]:
    """A session's columns: key, number, wa_id, user_id, active service, state, version."""
    return (
        key,
        session.phone_number_id,
        session.wa_id,
        session.user_id,
        session.active_service,
        storable(session.state),
        session.version,
    )


def replay_arguments(completion: Completion, now: datetime, reply_status: str) -> list[Any]:
    """postroom_complete_replay's arguments from p_id on."""
    item, letter, session = completion.item, completion.dead_letter, completion.session
    outcome, resolution, status, error, due = "delivered", "reprocessed", "reprocessed", None, None
    counted, keeps_order = not item.deferred, False
    if letter is not None:
        counted, keeps_order = counted and letter.counted, letter.keeps_order
        outcome, resolution = completion.place.value, letter.resolution or ""
        status, error = letter.status, text(letter.error)
        due = None if letter.retry_in is None else now + timedelta(seconds=letter.retry_in)
    change: tuple[Any, ...] = (None,) * 7
    if session is not None:
        change = session_arguments(item.session_key, session)
    return [
        uuid.UUID(item.dead_letter),
        outcome,
        resolution or None,
        status,
        error,
        due,
        completion.attempts,
        counted,
        keeps_order,
        *change,
        item.wa_id or item.user_id,
        [storable(reply) for reply in completion.replies],
        reply_status,
    ]
