"""Delivers while this process holds the lease, and stands by while another one does."""

from __future__ import annotations

from collections.abc import Callable

import trio

from .errors import JournalUnavailable
from .kernel import RestartIntensityExceeded
from .messages import Item
from .ports import Lease
from .tree import DeliveryTree, TreeSpec

_AGAIN_AFTER = 1.0  # seconds between a side that could not be kept running and the next one


class Owner:
    """`feed`, `look`, `replay` and the like reach the tree of the present epoch; without one the journal
    keeps everything, and whoever delivers finds it there.
    """

    def __init__(self, lease: Lease, spec: TreeSpec, *, on_epoch: Callable[[int | None], None]) -> None:
        self._lease = lease
        self._spec = spec
        self._on_epoch = on_epoch
        self.tree: DeliveryTree | None = None
        self._stand_by = trio.CancelScope()
        self._drain = trio.Event()

    def feed(self, first: int, last: int, items: list[Item]) -> None:
        if self.tree is not None:
            self.tree.feed(first, last, items)

    def is_fed(self) -> bool:
        """Whether `feed` has any use."""
        return self.tree is not None

    def look(self) -> None:
        if self.tree is not None:
            self.tree.look()

    def replay(self) -> None:
        if self.tree is not None:
            self.tree.replay()

    def change_services(self) -> None:
        if self.tree is not None:
            self.tree.change_services()

    def look_at_outbox(self) -> None:
        if self.tree is not None:
            self.tree.look_at_outbox()

    def look_at_statuses(self) -> None:
        if self.tree is not None:
            self.tree.look_at_statuses()

    def look_at_jobs(self) -> None:
        if self.tree is not None:
            self.tree.look_at_jobs()

    def drain(self) -> None:
        """Finish what is in hand, give the lease back, end."""
        self._drain.set()
        self._stand_by.cancel()

    async def run(self) -> None:
        while not self._drain.is_set():
            epoch: int | None = None
            self._stand_by = trio.CancelScope()  # a scope is entered once, and the lease may be lost
            with self._stand_by:
                epoch = await self._lease.acquire()
            if epoch is not None:
                try:
                    await self._deliver(epoch)
                finally:
                    self.tree = None
                    self._on_epoch(None)

    async def _deliver(self, epoch: int) -> None:
        self._on_epoch(epoch)
        try:
            async with trio.open_nursery() as nursery:
                cancel = nursery.cancel_scope.cancel
                self.tree = tree = DeliveryTree(
                    self._spec, epoch=epoch, may_attempt=self._lease.held, on_lease_lost=cancel
                )
                nursery.start_soon(self._hold, epoch, cancel)
                nursery.start_soon(self._drain_when_asked, tree)
                await tree.run()
                cancel()
        except* RestartIntensityExceeded as group:
            for error in group.exceptions:
                if isinstance(error, Exception):
                    self._spec.report("delivery", error)
            with trio.move_on_after(_AGAIN_AFTER):
                await self._drain.wait()
        with trio.move_on_after(2) as bounded:
            bounded.shield = True
            try:
                await self._lease.end(epoch)
            except JournalUnavailable:
                return  # it runs out by itself

    async def _hold(self, epoch: int, cancel: Callable[[], None]) -> None:
        await self._lease.hold(epoch)
        cancel()

    async def _drain_when_asked(self, tree: DeliveryTree) -> None:
        await self._drain.wait()
        await tree.drain()
