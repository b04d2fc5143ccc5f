"""The dispatcher: every message decided once, in order, within its limits, whatever happens around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
import trio.testing
from doubles import MemoryJournal, Rig
from hypothesis import given
from hypothesis import strategies as st

from actors import dispatcher as dispatcher_module
from actors.errors import JournalUnavailable
from actors.messages import Completion, Place

Clock = trio.testing.MockClock


def rides(*names: str) -> list[str]:
    return [f"rides:{name}" for name in names]


async def test_what_was_journaled_before_the_start_is_redelivered(autojump_clock: Clock) -> None:
    rig = Rig()
    rig.say(*rides(*"abcdef"), fed=False)
    async with rig.running():
        await rig.finish()
        rig.say(*rides("g"))
        await rig.finish()
    assert rig.decided() == rides(*"abcdefg")
    assert [envelope.redelivered for envelope in rig.counterparts["rides"].seen] == [True] * 6 + [False]


async def test_a_flush_in_order_goes_straight_to_the_sessions(autojump_clock: Clock) -> None:
    rig = Rig()
    async with rig.running():
        rig.say(*rides("a", "b"))
        await rig.finish()
        assert rig.decided() == rides("a", "b")
        assert rig.journal.calls["read"] == 0


async def test_flushes_out_of_order_are_put_in_order(autojump_clock: Clock) -> None:
    rig = Rig()
    async with rig.running():
        a, b, c = (rig.say(text, fed=False) for text in rides("a", "b", "c"))
        for flush in (c, a, b):
            rig.feed(flush)
        await rig.finish()
    assert rig.decided() == rides("a", "b", "c")


async def test_what_another_process_journaled_is_read_from_the_tail(autojump_clock: Clock) -> None:
    rig = Rig()
    async with rig.running():
        rig.say(*rides("a"), fed=False)
        rig.say(*rides("b"))
        await rig.finish()
        rig.say(*rides("c"), fed=False)
        rig.dispatcher.look()
        await rig.finish()
    assert rig.decided() == rides("a", "b", "c")


async def test_a_journal_that_is_away_is_waited_for(autojump_clock: Clock) -> None:
    rig = Rig(hold=1)
    rig.say(*rides("a", "b"), fed=False)
    for method in ("undelivered", "read", "tail", "complete"):
        rig.journal.fail(method)
        rig.journal.fail(method)
    async with rig.running():
        rig.say(*rides("c"), fed=False)
        rig.dispatcher.look()
        await rig.finish()
    assert rig.decided() == rides("a", "b", "c")


async def test_after_an_absence_of_the_journal_no_page_waits_for_as_long_again(autojump_clock: Clock) -> None:
    rig = Rig(hold=1)
    rig.journal.fail("read", *(JournalUnavailable("away") for _ in range(12)))
    async with rig.running():
        rig.say(*rides("a", "b", "c"))
        await trio.sleep(40)
        assert rig.decided() == rides("a")
        rig.say("jobs:x", sender="z")
        await trio.sleep(9)
        assert rig.decided("1") == rides("a", "b", "c")
        await rig.finish()


async def test_a_slow_session_delays_no_other(autojump_clock: Clock) -> None:
    rig = Rig(lanes=4, hold=2)
    rig.counterparts["rides"].script["rides:slow"].append(3.0)
    async with rig.running():
        rig.say(*rides("slow", *"abcdefgh"), sender="1")
        for sender in "234":
            rig.say(*rides("x", "y"), sender=sender)
        await trio.sleep(1)
        assert sorted(rig.decided()) == rides(*"xxxyyy")
        await rig.finish()
    assert rig.decided("1") == rides("slow", *"abcdefgh")


async def test_a_crashed_session_gets_its_messages_again_in_order(autojump_clock: Clock) -> None:
    rig = Rig(hold=3)
    rig.routes.crash["rides:b"] = 2
    async with rig.running():
        rig.say(*rides(*"abcde"))
        await trio.sleep(0.1)
        rig.say(*rides("f"))
        await rig.finish()
    assert rig.decided() == rides(*"abcdef")
    assert len(rig.crashes) == 2
    flags = {envelope.text: envelope.redelivered for envelope in rig.counterparts["rides"].seen}
    assert flags["rides:b"]
    assert not flags["rides:a"]


async def test_a_parked_session_takes_nothing_of_what_came_meanwhile(autojump_clock: Clock) -> None:
    """What waits in the child's mailbox goes back with the rest, or it would overtake it."""
    rig = Rig(waiting=1, lanes=1, takes=5.0, hold=6, timeout=9.0)
    async with rig.running():
        rig.say("rides:1", sender="a")
        await trio.sleep(0.1)
        rig.say("rides:2", sender="b")
        rig.journal.before = _slow_load
        rig.say("rides:3", sender="c")  # loads its session: others come meanwhile
        await trio.sleep(0.1)
        rig.say("menu 4", "rides:5", sender="c")
        await rig.finish()
    assert rig.decided("c") == ["rides:3", "menu 4", "rides:5"]
    assert rig.crashes == []


async def _slow_load(method: str) -> None:
    if method == "load_sessions":
        await trio.sleep(1)


async def test_sessions_are_served_in_the_order_of_their_line(autojump_clock: Clock) -> None:
    rig = Rig(waiting=1, takes=1.0, max_live=20)
    async with rig.running():
        senders = "abcdefgh"
        for sender in senders:
            rig.say(f"rides:{sender}", sender=sender)
            await trio.sleep(0.01)
        assert rig.dispatcher.statistics().waiting_for == {"rides": 6}
        rig.say("jobs:x", sender="z")
        await trio.sleep(1.1)
        assert "jobs:x" in rig.decided()
        await rig.finish()
        assert rig.counterparts["rides"].texts == rides(*senders)
        assert rig.dispatcher.statistics().waiting_for == {}


async def test_who_stands_in_line_in_vain_is_deferred_and_goes_on(autojump_clock: Clock) -> None:
    rig = Rig(waiting=1, takes=100.0, timeout=500, deadline=500, patience=1.0, max_live=20)
    async with rig.running():
        for sender in "abcdefgh":
            rig.say(f"rides:{sender}1", sender=sender)
            await trio.testing.wait_all_tasks_blocked()
        rig.say("rides:h2", "jobs:h", sender="h")
        await trio.sleep(0.9)
        assert rig.decided() == []
        assert rig.dispatcher.statistics().waiting_for == {"rides": 6}
        await trio.sleep(0.2)
        assert rig.dispatcher.statistics().waiting_for == {}
        assert rig.decided("h") == ["rides:h1", "rides:h2"]
        assert len(rig.decided()) == 7
        await trio.sleep(150)
        assert rig.decided("h") == ["rides:h1", "rides:h2", "jobs:h"]
        rig.say("menu", "rides:h3", sender="h")
        await rig.finish()
    assert rig.counterparts["rides"].texts == rides("a1", "b1")
    places = [done.place for done in rig.journal.outcomes.values() if done.item.wa_id == "h"]
    assert places == [Place.DEFERRED, Place.DEFERRED, Place.DELIVERED, Place.HANDLED, Place.DEFERRED]


async def test_who_lost_patience_is_delivered_all_the_same_where_there_is_room_by_then(
    autojump_clock: Clock,
) -> None:
    rig = Rig(waiting=1, takes=1.5, patience=1.0, max_live=20)

    async def slow_read(method: str) -> None:
        if method == "read":
            await trio.sleep(1.0)

    rig.journal.before = slow_read
    async with rig.running():
        for sender in "abc":
            rig.say(f"rides:{sender}", sender=sender)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1.1)
        assert rig.dispatcher.statistics().waiting_for == {}  # turned away, and being read
        await rig.finish()
    assert rig.counterparts["rides"].texts == rides(*"abc")


async def test_a_line_waits_for_a_service_that_takes_something_now_and_then(autojump_clock: Clock) -> None:
    rig = Rig(waiting=1, takes=0.9, patience=1.0, max_live=20)
    async with rig.running():
        for sender in "abcdefgh":
            rig.say(f"rides:{sender}", sender=sender)
            await trio.testing.wait_all_tasks_blocked()
        await rig.finish()
    assert rig.counterparts["rides"].texts == rides(*"abcdefgh")


async def test_only_a_few_of_a_line_lose_patience_at_once(autojump_clock: Clock) -> None:
    rig = Rig(waiting=1, takes=100.0, timeout=500, deadline=500, patience=1.0, max_live=100)
    async with rig.running():
        for number in range(42):
            rig.say(f"rides:{number}", sender=f"s{number}")
        await trio.sleep(1.01)
        assert rig.dispatcher.statistics().waiting_for == {"rides": 36}
        await trio.sleep(0.2)
        assert rig.dispatcher.statistics().waiting_for == {}
        await rig.finish()


async def test_live_sessions_are_bounded_and_those_idle_make_room(autojump_clock: Clock) -> None:
    rig = Rig(max_live=2, idle=1_000)
    async with rig.running():
        for sender in "abcdef":
            rig.say("rides:1", sender=sender)
            assert rig.dispatcher.statistics().live_sessions <= 2
        started = trio.current_time()
        await rig.finish()
        assert trio.current_time() - started < 10


async def test_a_session_that_waits_for_a_seat_gets_the_first_that_is_free(autojump_clock: Clock) -> None:
    """Not only when the one that sits there has been idle for its full time."""
    rig = Rig(max_live=1, idle=1_000, takes=2.0)
    async with rig.running():
        rig.say("rides:a", sender="a")
        await trio.sleep(0.1)
        rig.say("rides:b", sender="b")
        started = trio.current_time()
        await rig.finish()
        assert trio.current_time() - started < 10


async def test_a_parked_session_gives_its_seat_up(autojump_clock: Clock) -> None:
    rig = Rig(max_live=3, idle=1_000, waiting=1, takes=3.0)
    async with rig.running():
        for sender in "abc":
            rig.say("rides:1", sender=sender)
            await trio.sleep(0.01)
        rig.say("jobs:d", sender="d")
        await trio.sleep(3.5)
        assert "jobs:d" in rig.decided()


async def test_a_replay_waits_for_a_seat(autojump_clock: Clock) -> None:
    rig = Rig(max_live=1, idle=1_000)
    async with rig.running():
        for sender in "ab":
            rig.say("nobody:1", sender=sender)
        await rig.finish()
        assert not rig.dispatcher.replay(rig.replay_of(1, "rides"))  # b sits there
        assert rig.dispatcher.statistics().live_sessions == 1
        await trio.sleep(1)
        assert rig.dispatcher.replay(rig.replay_of(1, "rides"))
        await trio.sleep(1)
        assert rig.counterparts["rides"].texts == ["nobody:1"]


async def test_a_replay_does_not_pass_what_waits(autojump_clock: Clock) -> None:
    rig = Rig(hold=1, takes=1.0)
    async with rig.running():
        rig.say("nobody:1", *rides("a", "b", "c"))
        assert not rig.dispatcher.replay(rig.replay_of(1, "jobs"))
        await rig.finish()


async def test_a_crash_gives_the_replay_back_to_its_owner(autojump_clock: Clock) -> None:
    rig = Rig()
    async with rig.running():
        rig.say("nobody:1")
        await rig.finish()
        rig.counterparts["rides"].script["nobody:1"].append(OSError("lane"))
        replay = rig.replay_of(1, "rides")
        assert rig.dispatcher.replay(replay)
        await trio.sleep(1)
        assert rig.lost == [replay]


async def test_beyond_the_backlog_limit_the_tail_is_not_read_on(autojump_clock: Clock) -> None:
    rig = Rig(hold=1, max_backlog=3, takes=1.0)
    async with rig.running():
        for number in range(12):
            rig.say(f"rides:{number}")
        assert rig.dispatcher.statistics().backlog == 3
        await trio.sleep(0.7)
        assert rig.dispatcher.statistics().backlog <= 3
        await rig.finish()
    assert rig.decided() == [f"rides:{number}" for number in range(12)]


async def test_an_erased_message_holds_nobody_up(autojump_clock: Clock) -> None:
    rig = Rig(hold=1)
    rig.say(*rides("a", "b", "c"), fed=False)
    rig.journal.erased = {2}
    async with rig.running():
        await trio.sleep(5)
        assert rig.decided() == rides("a", "c")
        assert rig.dispatcher.statistics().undelivered == 0


async def test_the_sweep_finds_what_nobody_knows(autojump_clock: Clock) -> None:
    rig = Rig(sweep_every=10)
    async with rig.running():
        rig.say(*rides("a"), fed=False)
        rig.dispatcher._newest = 1  # as if it had been lost after it was seen
        await trio.sleep(25)
        assert rig.decided() == rides("a")


async def test_the_sweep_finds_what_was_journaled_in_silence(autojump_clock: Clock) -> None:
    rig = Rig(sweep_every=10)
    async with rig.running():
        await trio.sleep(1)  # the tail was read to its end
        rig.say(*rides("a"), fed=False)
        await trio.sleep(5)
        assert rig.decided() == []
        await trio.sleep(10)
        assert rig.decided() == rides("a")


async def test_what_is_swept_up_below_the_mark_is_a_straggler() -> None:
    rig = Rig()
    rig.say(*rides("a", "b"), fed=False)
    rig.dispatcher._newest = 2
    assert rig.dispatcher.marks() == (3, [])
    rig.dispatcher._enter(1, "100:1", None)
    assert rig.dispatcher.marks() == (3, [1])


async def test_stragglers_are_offered_until_they_have_a_row() -> None:
    rig = Rig()
    rig.dispatcher._newest, rig.dispatcher._mark = 10, 11
    for seq in (3, 5, 7):
        rig.dispatcher._enter(seq, f"k{seq}", None)
    assert rig.dispatcher.marks() == (11, [3, 5, 7])
    assert rig.dispatcher.marks() == (11, [3, 5, 7])
    rig.dispatcher.committed([], [5])
    assert rig.dispatcher.marks() == (11, [3, 7])


async def test_completions_of_a_dispatcher_before_count_for_nothing(autojump_clock: Clock) -> None:
    """A restarted dispatcher is told of what the one before had left with the completer."""
    rig = Rig(idle=1.0)
    held = trio.Event()

    async def hold(method: str) -> None:
        if method == "complete":
            await held.wait()

    rig.journal.before = hold
    async with rig.running():
        rig.say(*rides("a"))
        await trio.sleep(0.1)
        item = rig.journal.items[0]
        assert item is not None
        [done] = rig.dispatcher._conversations[item.session_key].uncommitted
        assert done is item
        foreign = Completion(item=replace(item), place=Place.HANDLED, service=None, rule="menu", attempts=0)
        rig.dispatcher.committed([foreign], [])
        assert list(rig.dispatcher._conversations[item.session_key].uncommitted) == [item]
        held.set()
        await trio.sleep(5)
        assert rig.dispatcher.statistics().live_sessions == 0  # it could passivate
        assert rig.dispatcher._conversations == {}


async def test_close_finishes_what_is_held_and_leaves_the_rest(autojump_clock: Clock) -> None:
    rig = Rig(hold=2, takes=1.0)
    async with rig.running():
        rig.say(*rides(*"abcde"))
        await trio.sleep(0.5)
        rig.dispatcher.close()
        rig.say(*rides("late"))
        await trio.sleep(10)
        assert rig.decided() == rides("a", "b")
        assert [seq for seq, _ in (await rig.journal.undelivered()).items] == [3, 4, 5, 6]


async def test_a_join_waits_for_the_absorbed_conversation(autojump_clock: Clock) -> None:
    rig = Rig(takes=1.0, lanes=4)
    async with rig.running():
        rig.say("jobs:0", sender="1")
        rig.say(*rides(*"abcd"), sender="u1")
        joined = rig.say("jobs:joined", sender="1", user_id="u1")
        assert joined.joins == {0: "100:u1"}
        await trio.sleep(3.5)
        assert rig.decided()[2:] == rides("b", "c")
        await rig.finish()
    assert rig.decided()[-2:] == ["rides:d", "jobs:joined"]


async def test_a_join_whose_last_message_was_erased_goes_on(autojump_clock: Clock) -> None:
    rig = Rig(hold=1)
    rig.counterparts["rides"].script["rides:1"].append(3.0)
    rig.say("jobs:0", sender="1", fed=False)
    rig.say("rides:1", "rides:gone", sender="u1", fed=False)
    assert rig.say("jobs:joined", sender="1", user_id="u1", fed=False).joins == {0: "100:u1"}
    rig.journal.erased = {3}
    async with rig.running():
        await trio.sleep(2)
        assert rig.decided() == ["jobs:0"]
        await trio.sleep(10)
        assert rig.decided() == ["jobs:0", "rides:1", "jobs:joined"]


async def test_a_session_that_waits_for_a_seat_is_not_passed_by_newcomers(autojump_clock: Clock) -> None:
    rig = Rig(max_live=1, idle=0.05)

    async def slow(method: str) -> None:
        if method == "read":
            await trio.sleep(0.5)

    rig.journal.before = slow
    async with rig.running():
        rig.say("menu first", sender="first")
        rig.say("menu waits", sender="waits")
        for number in range(40):
            rig.say(f"menu {number}", sender=f"n{number}")
            await trio.sleep(0.1)
        await rig.finish()
    assert rig.decided()[:4] == ["menu first", "menu waits", "menu 0", "menu 1"]


async def test_a_newcomer_does_not_pass_a_session_that_was_called(autojump_clock: Clock) -> None:
    rig = Rig(waiting=1, takes=1.0)

    async def slow(method: str) -> None:
        if method == "read":
            await trio.sleep(0.2)

    rig.journal.before = slow
    async with rig.running():
        for sender in "abc":
            rig.say(f"rides:{sender}", sender=sender)
            await trio.sleep(0.01)
        await trio.sleep(1.05)  # a is through, so c was called, and is being read
        rig.say("rides:d", sender="d")
        await rig.finish()
    assert rig.counterparts["rides"].texts == rides(*"abcd")


async def test_cancelling_a_wait_for_commits_leaves_nothing_broken(autojump_clock: Clock) -> None:
    rig = Rig()
    held = trio.Event()

    async def hold(method: str) -> None:
        if method == "complete":
            await held.wait()

    rig.journal.before = hold
    async with rig.running():
        rig.say(*rides("a"))
        await trio.sleep(1)
        with trio.move_on_after(1) as scope:
            await rig.dispatcher.until_committed("100:1")
        assert scope.cancelled_caught
        held.set()
        await rig.dispatcher.until_committed("100:1")
        await rig.finish()


class Watched(MemoryJournal):
    """Checks at each completion that the low-water mark passes nothing that could be forgotten."""

    async def complete(
        self, completions: Sequence[Completion], *, epoch: int, low_water: int, stragglers: Sequence[int]
    ) -> None:
        remembered = set(stragglers) | self.stragglers | self.outcomes.keys()
        for item in self.items[: low_water - 1]:
            assert item is None or item.seq in remembered, f"the mark {low_water} passed {item.seq}"
        assert not set(stragglers) & self.outcomes.keys(), "a finished message is offered as a straggler"
        for done in completions:
            assert done.item.seq not in self.outcomes, f"{done.item.seq} was decided twice"
        await super().complete(completions, epoch=epoch, low_water=low_water, stragglers=stragglers)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["fed", "fed", "fed", "late", "foreign", "wait", "wait long"]),
        st.lists(
            st.tuples(
                st.sampled_from("abcdefg"), st.sampled_from(["rides", "rides", "jobs", "menu", "nobody"])
            ),
            min_size=1,
            max_size=5,
        ),
    ),
    max_size=25,
)


@given(
    steps=STEPS,
    takes=st.sampled_from([0.0, 0.05, 0.6]),
    hold=st.integers(1, 4),
    max_live=st.integers(1, 4),
    max_backlog=st.integers(1, 12),
    waiting=st.integers(1, 3),
    lanes=st.integers(1, 2),
    idle=st.sampled_from([0.3, 50.0]),
    session_crashes=st.sets(st.integers(0, 40), max_size=6),
    service_crashes=st.sets(st.integers(0, 40), max_size=3),
    patience=st.sampled_from([0.2, 1.0, float("inf")]),
)
def test_whatever_happens_each_message_is_decided_once_in_order_within_the_limits(
    steps: list[tuple[str, list[tuple[str, str]]]],
    takes: float,
    hold: int,
    max_live: int,
    max_backlog: int,
    waiting: int,
    lanes: int,
    idle: float,
    session_crashes: set[int],
    service_crashes: set[int],
    patience: float,
) -> None:
    async def main() -> None:
        rig = Rig(
            takes=takes,
            hold=hold,
            max_live=max_live,
            max_backlog=max_backlog,
            waiting=waiting,
            lanes=lanes,
            idle=idle,
            patience=patience,
        )
        watched = Watched()
        rig.journal = rig.dispatcher._journal = watched
        said: list[tuple[str, str]] = []
        late: list[object] = []

        async def observe() -> None:
            largest = max((len(messages) for _, messages in steps), default=0)
            while True:
                statistics = rig.dispatcher.statistics()
                assert statistics.live_sessions <= max_live
                held = [len(one.held) for one in rig.dispatcher._conversations.values()]
                assert all(count <= hold for count in held)
                # One flush, and what sessions give back, may go beyond it.
                assert statistics.backlog <= max_backlog + 2 * largest + dispatcher_module._PAGE
                assert statistics.low_water <= statistics.newest + 1
                await trio.sleep(0.05)

        async with rig.running(), trio.open_nursery() as nursery:
            nursery.start_soon(observe)
            for action, messages in steps:
                if action.startswith("wait"):
                    await trio.sleep(0.1 if action == "wait" else 2.0)
                    continue
                flush = []
                for sender, domain in messages:
                    text = f"{domain}:{len(said)}"
                    if len(said) in session_crashes:
                        rig.routes.crash[text] = 1
                    if len(said) in service_crashes and domain in rig.counterparts:
                        rig.counterparts[domain].script[text].append(OSError("lane"))
                    said.append((sender, text))
                    flush.append((sender, text))
                result = rig.flush(flush, fed=action == "fed")
                if action == "late":
                    late.append(result)
                elif late:
                    rig.feed(late.pop())  # type: ignore[arg-type]  # flushes, kept for later
                if action == "foreign":
                    rig.dispatcher.look()
            rig.dispatcher.look()
            with trio.move_on_after(500) as scope:
                await rig.finish()
            assert not scope.cancelled_caught, f"stalled: {rig.dispatcher.statistics()}"
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            assert rig.dispatcher._conversations == {}
            assert rig.dispatcher.statistics().backlog == 0
        for sender in "abcdefg":
            assert rig.decided(sender) == [text for who, text in said if who == sender]
        for name, counterpart in rig.counterparts.items():
            for sender in "abcdefg":
                seen = [one.text for one in counterpart.seen if one.session.wa_id == sender]
                deferred = [
                    str(done.item.message["text"]["body"])
                    for done in rig.journal.outcomes.values()
                    if done.item.wa_id == sender and done.service == name and done.place is Place.DEFERRED
                ]
                # What was deferred stays so here, and nothing goes past it.
                assert list(dict.fromkeys([*seen, *deferred])) == [
                    text for who, text in said if who == sender and text.startswith(name)
                ]
        assert watched.stragglers == set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher_module, "_WINDOW", 4)
        patch.setattr(dispatcher_module, "_PAGE", 3)
        patch.setattr(dispatcher_module, "_BUFFERED", 2)
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
