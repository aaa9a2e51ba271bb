"""What clients do in the state machine: submit, submit again, cancel, run again, forget."""

import asyncio
import hashlib
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from comfyd.errors import Conflict, IdempotencyKeyReuse, InsufficientStorage, TaskNotFound
from comfyd.simulator import SimulatorOptions
from comfyd.submission import SubmitRequest
from comfyd.tasks import Added, IdempotencyKey, Status, Task
from tests.faults.machine_example import MOST_TASKS, Example
from tests.faults.machine_ledger import Broken, Wish
from tests.faults.machine_world import Died
from tests.support.service import colored

which = st.integers(0, MOST_TASKS - 1)


class Clients(Example):
    """Their rules. Each knows only what comfyd answered it."""

    @initialize(
        flavor=st.sampled_from(["0.3.75", "0.33"]),
        node_seconds=st.sampled_from([0.0, 0.02, 0.4]),
        tasks=st.integers(1, 3),
    )
    def begin(self, flavor: Any, node_seconds: float, tasks: int) -> None:
        """A world with a comfyd that works, and some tasks."""
        world = self.open_world(SimulatorOptions(flavor=flavor, node_seconds=node_seconds))

        async def step() -> None:
            await world.__aenter__()
            world.simulator.faults.class_seconds["EmptyImage"] = 1.0
            for _ in range(tasks):
                await self._submit(self._new_wish(0, keyed=False))

        self.run(step())

    def _new_wish(self, priority: int, *, keyed: bool) -> Wish:
        number = len(self.world.ledger.wishes)
        wish = Wish(color=0x010203 * (number + 1), priority=priority, key=f"key-{number}" if keyed else None)
        self.world.ledger.wishes.append(wish)
        return wish

    async def _submit(self, wish: Wish, *, body: str = "") -> Added | None:
        """Send it; None if nobody knows what became of it, or if the disk was full."""
        request = SubmitRequest(
            workflow=colored(wish.color), priority=wish.priority, metadata={"color": str(wish.color)}
        )
        digest = hashlib.sha256(f"{wish.color}{body}".encode()).hexdigest()
        key = None if wish.key is None else IdempotencyKey(key=wish.key, body_sha256=digest)
        comfyd = await self.world.start()
        try:
            added = await comfyd.ask(lambda service: service.state.submission.submit(request, key))
        except Died:
            wish.refused = False
            return None
        except InsufficientStorage:
            wish.refused = wish.task_id is None and key is None
            return None
        wish.refused = False
        if wish.task_id is None:
            wish.task_id = added.task.id
        if added.task.id != wish.task_id:
            raise Broken(f"idem_split: key {wish.key} is of {wish.task_id} and of {added.task.id}")
        return added

    @precondition(lambda self: len(self.world.ledger.wishes) < MOST_TASKS)
    @rule(priority=st.integers(-2, 2), keyed=st.booleans())
    def submit(self, priority: int, *, keyed: bool) -> None:
        """A new task."""
        self.run(self._submit(self._new_wish(priority, keyed=keyed)))

    @precondition(lambda self: self.world.ledger.keyed)
    @rule(which=which, other=st.booleans())
    def submit_again(self, which: int, *, other: bool) -> None:
        """The same key once more, with the same body or with another."""
        keyed = [wish for wish in self.world.ledger.keyed if not wish.deleted]
        if not keyed:
            return
        wish = keyed[which % len(keyed)]

        async def step() -> None:
            known = wish.task_id is not None
            if not other or not known:
                added = await self._submit(wish)
                assert added is None or added.replayed or not known, "a known key made a new task"
                return
            try:
                added = await self._submit(wish, body="other")
            except IdempotencyKeyReuse:
                return
            assert added is None, "a key was taken for two bodies"

        self.run(step())

    @precondition(lambda self: len(self.world.ledger.wishes) < MOST_TASKS)
    @rule(priority=st.integers(-2, 2))
    def submit_twice_at_once(self, priority: int) -> None:
        """One key, one body, two requests."""
        wish = self._new_wish(priority, keyed=True)

        async def step() -> None:
            await asyncio.gather(self._submit(wish), self._submit(wish))

        self.run(step())

    def _wish(self, which: int) -> Wish:
        tasks = self.world.ledger.tasks
        return tasks[which % len(tasks)]

    async def _task(self, wish: Wish) -> Task | None:
        return await self.world.read(lambda store: store.get(wish.task_id or ""))

    @precondition(lambda self: self.world.ledger.tasks)
    @rule(which=which)
    def cancel(self, which: int) -> None:
        """A task, whatever it does just now."""
        wish = self._wish(which)

        async def step() -> None:
            comfyd = await self.world.start()
            wish.cancels += 1
            try:
                await comfyd.ask(lambda service: service.state.control.cancel(wish.task_id or ""))
            except (Died, InsufficientStorage):
                return

        self.run(step())

    @precondition(lambda self: self.world.ledger.tasks)
    @rule(which=which)
    def retry(self, which: int) -> None:
        """Run a task again; one that has not ended refuses."""
        wish = self._wish(which)

        async def step() -> None:
            comfyd = await self.world.start()
            before = await self._task(wish)
            assert before is not None
            try:
                await comfyd.ask(lambda service: service.state.control.retry(before.id))
            except Conflict:
                assert not before.status.terminal, "an ended task was not run again"
                return
            except (Died, InsufficientStorage):
                pass
            after = await self._task(wish)
            if after is not None and after.seq != before.seq:
                wish.reruns.append(before.attempt_count)
                wish.status, wish.cancels = Status.QUEUED, 0

        self.run(step())

    @precondition(lambda self: self.world.ledger.tasks)
    @rule(which=which)
    def delete(self, which: int) -> None:
        """Forget a task; one that has not ended refuses."""
        wish = self._wish(which)

        async def step() -> None:
            comfyd = await self.world.start()
            try:
                await comfyd.ask(lambda service: service.state.control.delete(wish.task_id or ""))
            except (Conflict, InsufficientStorage):
                return
            except (Died, TaskNotFound):
                pass
            wish.deleted = await self._task(wish) is None

        self.run(step())
