"""The session actor: one message at a time, in order, with the state that the one before left."""

from __future__ import annotations

from datetime import timedelta

import pytest
import trio
import trio.testing
from doubles import Rig

from actors.kernel import Address
from actors.messages import Ack, Completion, Place, Reject, Reply, Retry, Session, SessionChange
from actors.ports import Unreadable

Clock = trio.testing.MockClock


async def finished(rig: Rig, *texts: str) -> list[tuple[Place, str | None]]:
    """Say these, wait, and tell where they ended and whose the conversation is."""
    async with rig.running():
        first = rig.say(*texts).first_seq
        await rig.finish()
        done = [rig.journal.outcomes[first + number] for number in range(len(texts))]
        return [(one.place, one.session.active_service if one.session else None) for one in done]


async def test_each_outcome_has_its_place(autojump_clock: Clock) -> None:
    rig = Rig()
    rides = rig.counterparts["rides"].script
    rides["rides:rejected"].append(Reject("no"))
    rides["rides:later"].append(Retry(after=60.0))
    rides["rides:unreadable"].append(Unreadable("?"))
    assert await finished(
        rig, "menu", "rides:ok", "rides:rejected", "rides:later", "rides:unreadable", "nobody:x", "exit"
    ) == [
        (Place.HANDLED, None),
        (Place.DELIVERED, "rides"),
        (Place.REJECTED, "rides"),
        (Place.DEAD_LETTER, "rides"),
        (Place.DELIVERED, "rides"),
        (Place.DEAD_LETTER, "rides"),
        (Place.HANDLED, None),
    ]
    done = list(rig.journal.outcomes.values())
    assert done[2].dead_letter is not None
    assert (done[2].dead_letter.status, done[2].dead_letter.resolution) == ("failed", "rejected")
    assert done[3].dead_letter is not None
    assert (done[3].dead_letter.status, done[3].dead_letter.retry_in) == ("pending", 60.0)
    assert done[4].unreadable_answer


async def test_a_domain_without_a_service_is_a_dead_letter_without_an_attempt(autojump_clock: Clock) -> None:
    rig = Rig()
    await finished(rig, "nobody:x")
    [done] = rig.journal.outcomes.values()
    assert done.dead_letter is not None
    assert (done.dead_letter.status, done.dead_letter.resolution) == ("pending", "no_service")
    assert done.attempts == 0
    assert done.session is not None
    assert done.session.active_service is None


async def test_messages_are_decided_in_order_whatever_their_services_take(autojump_clock: Clock) -> None:
    rig = Rig(lanes=3)
    rig.counterparts["rides"].script["rides:slow"].append(3.0)
    texts = ["rides:slow", "menu 1", "jobs:x", "menu 2", "rides:y"]
    await finished(rig, *texts)
    assert rig.decided() == texts


async def test_state_changes_are_seen_by_the_next_message(autojump_clock: Clock) -> None:
    rig = Rig()
    rides = rig.counterparts["rides"].script
    rides["rides:1"].append(Ack(session=SessionChange(state={"step": 1})))
    rides["rides:2"].append(Ack((Reply("bye"),), SessionChange(active_service=None)))
    await finished(rig, "rides:1", "rides:2", "rides:3", "jobs:4")
    seen = dict(rig.routes.sessions)
    assert seen["rides:2"].state == {"step": 1}
    assert (seen["rides:3"].active_service, seen["rides:3"].state) == (None, {"step": 1})
    assert seen["jobs:4"].state == {}  # another time with rides is a new one
    last = rig.journal.sessions["100:1"][0]
    assert (last.active_service, last.state) == ("jobs", {})
    versions = [session.version for _, session in rig.routes.sessions]
    assert versions == sorted(set(versions))
    assert [reply for _, reply in rig.journal.outbox] == [{"type": "text", "text": {"body": "bye"}}]


async def test_a_session_that_passivated_is_loaded_again(autojump_clock: Clock) -> None:
    rig = Rig(idle=5.0)
    rig.counterparts["rides"].script["rides:1"].append(Ack(session=SessionChange(state={"step": 1})))
    async with rig.running():
        rig.say("rides:1")
        await trio.sleep(20)
        assert rig.dispatcher.statistics().live_sessions == 0
        rig.say("rides:2")
        await rig.finish()
    assert rig.routes.sessions[-1][1].state == {"step": 1}
    assert rig.journal.calls["load_sessions"] == 2


async def test_passivation_waits_for_the_commit(autojump_clock: Clock) -> None:
    rig = Rig(idle=1.0)
    gate = trio.Event()

    async def hold(method: str) -> None:
        if method == "complete":
            await gate.wait()

    rig.journal.before = hold
    rig.counterparts["rides"].script["rides:1"].append(Ack(session=SessionChange(state={"step": 1})))
    async with rig.running():
        rig.say("rides:1")
        await trio.sleep(10)
        assert rig.dispatcher.statistics().live_sessions == 1
        rig.say("rides:2")  # comes while it waits, and goes to the same incarnation
        await trio.sleep(10)
        gate.set()
        await rig.finish()
        assert rig.journal.calls["load_sessions"] == 1
        assert rig.routes.sessions[-1][1].state == {"step": 1}


class Prompt(Address[Completion]):
    """A completer's address that is left only when the completer has done what it can."""

    async def tell(self, message: Completion) -> None:
        await super().tell(message)
        await trio.testing.wait_all_tasks_blocked()


async def test_a_commit_may_come_before_the_session_says_that_it_is_through(autojump_clock: Clock) -> None:
    rig = Rig(idle=1.0)
    rig.completer = Prompt("completer", 10)
    gate = trio.Event()

    async def hold(method: str) -> None:
        if method == "complete" and rig.journal.calls["complete"] > 1:
            await gate.wait()

    rig.journal.before = hold
    async with rig.running():
        rig.say("rides:1", "rides:2")
        await trio.sleep(10)
        assert rig.decided() == ["rides:1"]
        assert rig.dispatcher.statistics().live_sessions == 1  # the second is not committed
        gate.set()
        await trio.sleep(10)
        assert rig.dispatcher.statistics().live_sessions == 0
        assert rig.dispatcher._conversations == {}


async def test_after_a_crash_the_state_is_loaded_when_it_is_committed(autojump_clock: Clock) -> None:
    rig = Rig()

    async def slow(method: str) -> None:
        if method == "complete":
            await trio.sleep(5)  # longer than a crashed session pauses

    rig.journal.before = slow
    rig.counterparts["rides"].script["rides:1"].append(Ack(session=SessionChange(state={"step": 1})))
    rig.routes.crash["rides:2"] = 1
    async with rig.running():
        rig.say("rides:1", "rides:2")
        await rig.finish()
    assert rig.routes.sessions[-1][0] == "rides:2"
    assert rig.routes.sessions[-1][1].state == {"step": 1}


async def test_a_session_that_is_too_old_starts_anew(autojump_clock: Clock) -> None:
    rig = Rig()
    rig.counterparts["rides"].script["rides:1"].append(Ack(session=SessionChange(state={"step": 1})))
    async with rig.running():
        rig.say("rides:1")
        await rig.finish()
        rig.now += timedelta(hours=24)
        rig.say("rides:2")
        await rig.finish()
        rig.now += timedelta(hours=24, seconds=1)
        rig.say("rides:3")
        await rig.finish()
    sessions = [session for _, session in rig.routes.sessions]
    assert [session.state for session in sessions] == [{}, {"step": 1}, {}]
    assert sessions[2].active_service is None
    assert sessions[2].version > sessions[1].version


async def test_a_replay_goes_to_its_domain_whatever_the_session_is_in(autojump_clock: Clock) -> None:
    rig = Rig()
    async with rig.running():
        rig.say("nobody:1", "jobs:2")
        await rig.finish()
        rig.journal.request_retry(1)
        [claimed] = await rig.journal.claim_dead_letters(1, 10, ["nobody"])
        identity = str(claimed.dead_letter)
        replay = rig.replay_of(claimed.seq, "rides")
        assert replay.dead_letter == identity
        assert rig.dispatcher.replay(replay)
        await trio.sleep(1)
        assert [one.text for one in rig.counterparts["rides"].seen] == ["nobody:1"]
        [envelope] = rig.counterparts["rides"].seen
        assert envelope.replay
        assert envelope.redelivered
        assert rig.journal.letters[identity].status == "reprocessed"
        assert rig.journal.sessions["100:1"][0].active_service == "jobs"


async def test_a_join_takes_the_absorbed_state_over(autojump_clock: Clock) -> None:
    rig = Rig(lanes=2)
    rig.counterparts["rides"].script["rides:1"].append(Ack(session=SessionChange(state={"step": 1})))
    async with rig.running():
        rig.say("menu", sender="1", fed=True)
        await rig.finish()
        del rig.journal.sessions["100:1"]  # cleaned up: its name outlives it
        rig.now += timedelta(hours=25)
        await trio.sleep(20)
        rig.say("rides:1", sender="u1")
        rig.say("rides:2", sender="1", user_id="u1")
        await rig.finish()
    text, session = rig.routes.sessions[-1]
    assert text == "rides:2"
    assert (session.key, session.state, session.user_id) == ("100:1", {"step": 1}, "u1")


async def test_names_learnt_later_are_kept(autojump_clock: Clock) -> None:
    rig = Rig()
    async with rig.running():
        rig.say("rides:1", sender="1")
        rig.say("rides:2", sender="1", user_id="u1")
        rig.say("rides:3", sender="1")
        await rig.finish()
    assert [session.user_id for _, session in rig.routes.sessions] == [None, "u1", "u1"]
    assert rig.journal.sessions["100:1"][0].user_id == "u1"


async def test_without_the_lease_the_message_stays_in_the_journal(autojump_clock: Clock) -> None:
    rig = Rig()
    rig.held_lease = False
    async with rig.running():
        rig.say("rides:1")
        await trio.sleep(5)
        assert rig.decided() == []
        rig.held_lease = True
        await rig.finish()
        assert rig.counterparts["rides"].texts == ["rides:1"]


@pytest.mark.parametrize("after", [0.1, 0.6, 1.2])
async def test_a_cancelled_session_leaves_its_message_undelivered(
    autojump_clock: Clock, after: float
) -> None:
    """Loading, waiting for the service, waiting for the commit: in none of them is an outcome made up."""
    rig = Rig(takes=0.5)

    async def slow(method: str) -> None:
        if method in ("load_sessions", "complete"):
            await trio.sleep(0.5)

    rig.journal.before = slow
    async with rig.running():
        rig.say("rides:1")
        await trio.sleep(after)
    assert rig.decided() == []
    rig.journal.before = None
    assert [seq for seq, _ in (await rig.journal.undelivered()).items] == [1]


async def test_a_session_without_a_change_keeps_its_version(autojump_clock: Clock) -> None:
    rig = Rig()
    async with rig.running():
        rig.say("rides:1", "rides:2")
        await rig.finish()
    one, two = (done.session for done in rig.journal.outcomes.values())
    assert isinstance(one, Session)
    assert one == two


async def test_after_an_erasure_a_session_is_what_the_journal_has(
    autojump_clock: Clock,
) -> None:
    rig = Rig()
    async with rig.running():
        rig.say("rides:1", "rides:2")
        await rig.finish()
        [key] = rig.journal.sessions
        del rig.journal.sessions[key]
        rig.erasures += 1
        rig.say("exit", "rides:3")
        await rig.finish()
    seen = [(text, session.active_service) for text, session in rig.routes.sessions]
    assert seen == [("rides:1", None), ("rides:2", "rides"), ("exit", None), ("rides:3", None)]


# Deferral


async def test_a_conversation_goes_on_past_a_service_that_is_left_alone(autojump_clock: Clock) -> None:
    rig = Rig(breaker_failures=1)
    rig.counterparts["rides"].script["rides:1"].append(Retry(reason="down"))
    assert await finished(rig, "rides:1", "rides:2", "menu", "jobs:x", "rides:3", "exit") == [
        (Place.DEFERRED, "rides"),
        (Place.DEFERRED, "rides"),
        (Place.HANDLED, "rides"),
        (Place.DELIVERED, "jobs"),
        (Place.DEFERRED, "rides"),
        (Place.HANDLED, None),
    ]
    assert rig.counterparts["rides"].texts == ["rides:1"]
    letters = [done.dead_letter for done in rig.journal.outcomes.values() if done.dead_letter is not None]
    assert [(one.status, one.resolution, one.counted, one.keeps_order) for one in letters] == [
        ("pending", "deferred", False, True)
    ] * 3


async def test_nobody_goes_past_one_that_waits_when_the_service_is_well(
    autojump_clock: Clock,
) -> None:
    rig = Rig(breaker_failures=1)
    rig.counterparts["rides"].script["rides:1"].append(Retry(reason="down"))
    async with rig.running():
        rig.say("rides:1")
        await trio.sleep(10)
        rig.say("rides:2")
        rig.say("rides:other", sender="2")
        await rig.finish()
    assert rig.counterparts["rides"].texts == ["rides:1", "rides:other"]
    assert [done.place for done in rig.journal.outcomes.values()] == [
        Place.DEFERRED,
        Place.DEFERRED,
        Place.DELIVERED,
    ]


async def test_a_dead_letter_holds_up_its_conversation_where_the_service_is_strict(
    autojump_clock: Clock,
) -> None:
    rig = Rig(strict=True)
    rig.counterparts["rides"].script["rides:1"].extend([Retry()] * 3)
    rig.counterparts["rides"].script["rides:never"].append(Reject("no"))
    await finished(rig, "rides:never", "rides:1", "rides:2", "jobs:x")
    assert [done.place for done in rig.journal.outcomes.values()] == [
        Place.REJECTED,
        Place.DEAD_LETTER,
        Place.DEFERRED,
        Place.DELIVERED,
    ]


async def test_a_retry_that_finds_its_service_left_alone_stays_what_it_is(autojump_clock: Clock) -> None:
    rig = Rig(breaker_failures=4)
    rides = rig.counterparts["rides"].script
    rides["rides:1"].extend([Retry()] * 3)
    rides["rides:2"].append(Retry())
    async with rig.running():
        rig.say("rides:1")
        await rig.finish()
        rig.say("rides:2", sender="2")
        rig.journal.request_retry(1)
        [replay] = await rig.journal.claim_dead_letters(1, 1, ["rides"])
        await trio.sleep(0.1)
        assert rig.dispatcher.replay(replay)
        await trio.sleep(0.1)
    first, second = rig.journal.letters.values()
    assert (first.status, first.resolution, first.retries) == ("pending", None, 0)
    assert (second.status, second.resolution) == ("pending", "deferred")
    assert rig.journal.outcomes[1].place is Place.DEAD_LETTER
    assert rig.counterparts["rides"].texts == ["rides:1"] * 3 + ["rides:2"]
