"""Supervision: who restarts, in which order, how often, and how a tree is drained and buried."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from actors.kernel import ChildSpec, RestartIntensityExceeded, Strategy, Supervisor


class Cast:
    """Children that tell what happens to them, crash on command and end when drained."""

    def __init__(
        self,
        *names: str,
        strategy: Strategy = Strategy.REST_FOR_ONE,
        max_restarts: int = 5,
        slow: float = 0.0,
    ) -> None:
        self.log: list[str] = []
        self.slow = slow
        self.crash_at_start: dict[str, int] = {}
        self.crash_when_cancelled: set[str] = set()
        self._orders: dict[str, trio.Event] = {name: trio.Event() for name in names}
        self._crash: set[str] = set()
        self.supervisor = Supervisor(
            "cast",
            [self._spec(name) for name in names],
            strategy=strategy,
            max_restarts=max_restarts,
            period=10,
            on_crash=lambda name, error: self.log.append(f"{name} crashed"),
        )

    def _spec(self, name: str) -> ChildSpec:
        def bury() -> None:
            self.log.append(f"bury {name}")

        return ChildSpec(name, lambda: self._run(name), self._drain(name), bury)

    async def _run(self, name: str) -> None:
        self.log.append(f"+{name}")
        if self.crash_at_start.get(name):
            self.crash_at_start[name] -= 1
            raise OSError(name)
        try:
            await self._orders[name].wait()
        except trio.Cancelled:
            self.log.append(f"-{name}")
            if name in self.crash_when_cancelled:
                self.crash_when_cancelled.discard(name)
                raise OSError(name) from None
            with trio.CancelScope(shield=True):
                await trio.sleep(self.slow)
            raise
        if name in self._crash:
            self._crash.discard(name)
            self._orders[name] = trio.Event()
            raise OSError(name)
        await trio.sleep(1)
        self.log.append(f"{name} done")

    def crash(self, *names: str) -> None:
        for name in names:
            self._crash.add(name)
            self._orders[name].set()

    def _drain(self, name: str) -> Callable[[], None]:
        def drain() -> None:
            self.log.append(f"drain {name}")
            self._orders[name].set()

        return drain

    def since(self) -> list[str]:
        log, self.log[:] = list(self.log), []
        return log


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_children_start_in_order(autojump_clock: trio.testing.MockClock) -> None:
    for _ in range(20):
        cast = Cast("a", "b", "c", "d")
        async with trio.open_nursery() as nursery:
            await nursery.start(cast.supervisor.run)
            await settled()
            assert cast.log == ["+a", "+b", "+c", "+d"]
            nursery.cancel_scope.cancel()


async def test_one_for_one_restarts_the_one_that_crashed(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a", "b", "c", strategy=Strategy.ONE_FOR_ONE)
    async with trio.open_nursery() as nursery:
        await nursery.start(cast.supervisor.run)
        await settled()
        cast.since()
        cast.crash("a")
        await settled()
        assert cast.since() == ["a crashed", "+a"]
        nursery.cancel_scope.cancel()


async def test_rest_for_one_restarts_the_later_ones_after_it(autojump_clock: trio.testing.MockClock) -> None:
    for _ in range(20):
        cast = Cast("a", "b", "c", "d")
        async with trio.open_nursery() as nursery:
            await nursery.start(cast.supervisor.run)
            await settled()
            cast.since()
            cast.crash("b")
            await settled()
            assert cast.since() == ["b crashed", "-d", "-c", "+b", "+c", "+d"]
            nursery.cancel_scope.cancel()


async def test_children_that_crash_together_all_come_back(autojump_clock: trio.testing.MockClock) -> None:
    for _ in range(30):
        cast = Cast("a", "b", "c", "d", slow=1)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                await nursery.start(cast.supervisor.run)
                await settled()
                cast.since()
                cast.crash("a", "b")
                await trio.sleep(10)
                log = cast.since()
                assert sorted(name for name in log if name.startswith("+")) == ["+a", "+b", "+c", "+d"]
                starts = [entry for entry in log if entry.startswith("+")]
                assert starts.index("+a") < starts.index("+b") < starts.index("+c") < starts.index("+d")
                nursery.cancel_scope.cancel()


async def test_a_crash_while_being_restarted_loses_nobody(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a", "b", "c")
    cast.crash_when_cancelled = {"b"}
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(cast.supervisor.run)
            await settled()
            cast.since()
            cast.crash("a")
            await trio.sleep(10)
            assert cast.since() == ["a crashed", "-c", "-b", "b crashed", "+a", "+b", "+c"]
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["a", "b", "c"])
async def test_a_crash_at_the_first_step_holds_nobody_up(
    autojump_clock: trio.testing.MockClock, name: str
) -> None:
    for _ in range(10):
        cast = Cast("a", "b", "c")
        cast.crash_at_start = {name: 2}
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                await nursery.start(cast.supervisor.run)
                await trio.sleep(10)
                running = [entry for entry in cast.log if entry[0] in "+-"]
                assert running[-1] == "+c"
                assert cast.log.count(f"{name} crashed") == 2
                for one in "abc":
                    ended = cast.log.count(f"-{one}") + cast.log.count(f"{one} crashed")
                    assert cast.log.count(f"+{one}") == ended + 1
                nursery.cancel_scope.cancel()


async def test_intensity_is_counted_over_the_period(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a", "b", max_restarts=2)
    async with trio.open_nursery() as nursery:
        await nursery.start(cast.supervisor.run)
        for _ in range(6):  # two in each period of ten seconds: for ever
            await settled()
            cast.crash("a")
            await trio.sleep(5.1)
        assert cast.log.count("a crashed") == 6
        nursery.cancel_scope.cancel()


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


async def test_one_crash_too_many_ends_the_supervisor(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a", "b", max_restarts=2)

    async def crash_thrice() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cast.supervisor.run)
            for _ in range(3):
                await settled()
                cast.crash("b")
                await trio.sleep(1)

    with pytest.raises(ExceptionGroup) as caught:
        await crash_thrice()
    found = caught.value.subgroup(RestartIntensityExceeded)
    assert found is not None
    [error] = leaves(found)
    assert "cast: 3 crashes within 10 s, the last in b: OSError" in str(error)
    assert isinstance(error.__cause__, OSError)


async def test_all_are_buried_once_when_it_gives_up(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a", "b", "c", max_restarts=0)
    cast.crash_at_start = {"b": 1}
    with pytest.raises(ExceptionGroup):
        await cast.supervisor.run()
    assert [entry for entry in cast.log if entry.startswith("bury")] == ["bury a", "bury b", "bury c"]


async def test_all_are_buried_once_when_it_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a", "b")
    with trio.move_on_after(1):
        await cast.supervisor.run()
    assert [entry for entry in cast.log if entry.startswith("bury")] == ["bury a", "bury b"]


async def test_drain_ends_the_upstream_one_first(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a", "b", "c")
    async with trio.open_nursery() as nursery:
        await nursery.start(cast.supervisor.run)
        await settled()
        cast.since()
        await cast.supervisor.drain()
    assert cast.since() == [
        *("drain c", "c done", "bury c"),
        *("drain b", "b done", "bury b"),
        *("drain a", "a done", "bury a"),
    ]


async def test_drain_waits_for_a_child_that_is_being_restarted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """With a clock that jumps only when all wait: a drain that polls would never end."""
    cast = Cast("a", "b", slow=3)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(cast.supervisor.run)
            await settled()
            cast.crash("a")
            await settled()  # b takes three seconds to go
            await cast.supervisor.drain()
    assert cast.log[-1] == "bury a"
    assert cast.log.count("+b") == 2


async def test_drain_ends_when_the_supervisor_gives_up(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a", "b", max_restarts=0)

    async def drain_what_gives_up() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cast.supervisor.run)
            await settled()
            with trio.CancelScope(shield=True):
                cast.crash("a")
                await cast.supervisor.drain()

    with trio.fail_after(60), pytest.raises(ExceptionGroup):
        await drain_what_gives_up()


async def test_a_cancelled_drain_can_be_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a", "b")
    async with trio.open_nursery() as nursery:
        await nursery.start(cast.supervisor.run)
        await settled()
        with trio.move_on_after(0.5):
            await cast.supervisor.drain()
        await cast.supervisor.drain()
    assert cast.log[-1] == "bury a"


async def test_a_crash_during_cancellation_of_the_supervisor_restarts_nobody(
    autojump_clock: trio.testing.MockClock,
) -> None:
    cast = Cast("a", "b")
    cast.crash_when_cancelled = {"a", "b"}
    with trio.move_on_after(1):
        await cast.supervisor.run()
    assert cast.log.count("+a") == cast.log.count("+b") == 1


async def test_a_supervisor_runs_once(autojump_clock: trio.testing.MockClock) -> None:
    cast = Cast("a")
    with trio.move_on_after(1):
        await cast.supervisor.run()
    with trio.fail_after(60), pytest.raises(RuntimeError, match="has run before"):
        await cast.supervisor.run()
