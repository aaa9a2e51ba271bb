"""The long forms of the tests that kill: seeded, bounded in time, summed up in one table.

    python -m tests.faults.chaos [--seed N] [--minutes M] [--jobs J] [--part PART ...] [--only RUN]

Every run has a seed of its own, which is said where it fails; `--only` makes that one run again. Without
`--minutes` everything is run; with it the parts take turns until the time is over, and what is under way then
is waited for. Exits 1 if a counter of any run is not 0.
"""

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Final

import msgspec

from comfyd.failpoints import NAMES
from tests.faults import scenes
from tests.faults.checker import COUNTERS
from tests.faults.rig import PATIENCE, RECOVERED_SECONDS, SLOW_RECOVERED_SECONDS
from tests.faults.scenes import FORGETFUL, STATES, Outcome, Size, State

FAILPOINT_SEEDS: Final = 5
RACE_SEEDS: Final = 5
COMFYD_KILLS: Final = 300
COMFYUI_KILLS: Final = 100
TASKS: Final = 200
CLIENTS: Final = 8
SECONDS_PER_KILL: Final = 4.0
"""What a random kill takes at most, with the start after it and its share of the load."""
SHARE: Final = 0.5
"""Of the time that is left, for a run that can be as long as one likes."""

Play = Callable[[Path, float | None], Awaitable[Outcome]]
"""Plays a scene in a folder; given the monotonic moment after which it should come to an end."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One scene with its seed. `forgetful`: the promises allow second runs."""

    part: str
    seed: str
    play: Play
    forgetful: bool = False
    must_reach: bool = False
    """It is no run at all if comfyd did not die at the failpoint."""


class Sum(msgspec.Struct, kw_only=True):
    """One line of the table. Lives as long as the program."""

    runs: int = 0
    failed: int = 0
    reached: int = 0
    """Runs in which comfyd died at the failpoint, where one was armed."""
    kills: int = 0
    tasks: int = 0
    second_runs: int = 0
    slowest: float = 0.0
    counters: dict[str, int] = {}

    def broke(self) -> None:
        """A run that came to no end."""
        self.runs += 1
        self.failed += 1
        self.counters["other"] = self.counters.get("other", 0) + 1

    def add(self, outcome: Outcome, faults: Sequence[str]) -> None:
        """One run more."""
        self.runs += 1
        self.failed += bool(faults)
        self.reached += outcome.reached
        self.kills += sum(outcome.kills.values())
        self.tasks += outcome.verdict.tasks
        self.second_runs += outcome.verdict.second_runs
        self.slowest = max(self.slowest, *outcome.recoveries, 0.0)
        for name, sentences in outcome.verdict.found.items():
            self.counters[name] = self.counters.get(name, 0) + len(sentences)


def runs(base: int) -> dict[str, list[Run]]:
    """All there are, by part. The same base gives the same."""
    return {
        "failpoints": list(_failpoints(NAMES, base)),
        "pairs": list(_pairs(NAMES, base)),
        "same key": list(_races(base)),
        "kills of comfyd": [_kills("comfyd", COMFYD_KILLS, base)],
        "kills of comfyui": [_kills("comfyui", COMFYUI_KILLS, base)],
    }


def _failpoints(names: Sequence[str], base: int) -> Iterator[Run]:
    def play(name: str, seed: str) -> Play:
        return lambda folder, _: scenes.failpoint(folder, name, seed, mixed=True)

    every = {name: scenes.seeds(name, FAILPOINT_SEEDS, base) for name in names}
    for round_ in range(FAILPOINT_SEEDS):
        for name in names:
            seed = every[name][round_]
            yield Run(part="failpoints", seed=seed, play=play(name, seed), must_reach=True)


def _pairs(names: Sequence[str], base: int) -> Iterator[Run]:
    def play(name: str, state: State, seed: str) -> Play:
        return lambda folder, _: scenes.pair(folder, name, state, seed)

    every = [(name, state) for name in names for state in STATES]
    scenes.shuffle(every, base)
    for name, state in every:
        (seed,) = scenes.seeds(f"{name}+{state.replace(' ', '-')}", 1, base)
        yield Run(part="pairs", seed=seed, play=play(name, state, seed), forgetful=state in FORGETFUL)


def _races(base: int) -> Iterator[Run]:
    def play(name: str, seed: str) -> Play:
        return lambda folder, _: scenes.same_key(folder, name, seed)

    for name in ("accept.checked", "accept.committed"):
        for seed in scenes.seeds(f"race-{name}", RACE_SEEDS, base):
            yield Run(part="same key", seed=seed, play=play(name, seed), must_reach=True)


def _kills(victim: scenes.Victim, kills: int, base: int) -> Run:
    (seed,) = scenes.seeds(f"kills-{victim}", 1, base)

    async def play(folder: Path, until: float | None) -> Outcome:
        patience = kills * SECONDS_PER_KILL
        if until is not None:  # the other parts want their share of the time
            now = time.monotonic()
            until = now + max(until - now, 0) * SHARE
            patience = until - now + PATIENCE
        size = Size(kills=kills, tasks=TASKS, clients=CLIENTS, until=until, patience=patience)
        return await scenes.random_kills(folder, victim, seed, size)

    return Run(part=f"kills of {victim}", seed=seed, play=play, forgetful=victim == "comfyui")


def faults(run: Run, outcome: Outcome) -> list[str]:
    """What is wrong with a run, for people."""
    found = [] if outcome.verdict.clean else [str(outcome.verdict)]
    slow = max(outcome.recoveries, default=0.0)
    if slow > (SLOW_RECOVERED_SECONDS if run.part == "pairs" else RECOVERED_SECONDS):
        found.append(f"recovery took {slow:.2f} s")
    if outcome.verdict.second_runs and not run.forgetful:
        found.append(f"{outcome.verdict.second_runs} second runs, where none has to be")
    if run.part == "pairs" and outcome.repeats < outcome.verdict.second_runs:
        found.append(f"{outcome.verdict.second_runs} second runs, and {outcome.repeats} by the metrics")
    if run.must_reach and not outcome.reached:
        found.append("comfyd did not reach the failpoint")
    return found


class Chaos:
    """Plays runs, some at a time. Lives as long as the program."""

    def __init__(self, chosen: Sequence[Run], base: int, minutes: float | None) -> None:
        self._base = base
        self._left = iter(chosen)
        self._until = None if minutes is None else time.monotonic() + minutes * 60
        self.sums: dict[str, Sum] = defaultdict(lambda: Sum(counters={}))

    async def play(self) -> None:
        """One run after the other, until none is left or the time is over."""
        for run in self._left:
            if self._until is not None and time.monotonic() > self._until:
                return
            found = await self._played(run)
            if found:
                say(f"FAILED {run.part}: --seed {self._base} --only {run.seed}", *found)

    async def _played(self, run: Run) -> list[str]:
        try:
            with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
                outcome = await run.play(Path(folder, "world"), self._until)
        except (AssertionError, ExceptionGroup, TimeoutError, OSError):  # the next run may tell more
            self.sums[run.part].broke()
            return ["the run broke off:", traceback.format_exc()]
        found = faults(run, outcome)
        self.sums[run.part].add(outcome, found)
        return found


def say(*lines: str) -> None:
    """Print at once: a run that is stopped has said what it knew."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def table(sums: dict[str, Sum]) -> str:
    """All sums, a part on each line."""
    head = (
        "part",
        "runs",
        "reached",
        "kills",
        "tasks",
        *COUNTERS,
        "other",
        "second runs allowed",
        "slowest recovery",
    )
    rows: list[tuple[str, ...]] = [head]
    for name, each in sums.items():
        counters = [str(each.counters.get(counter, 0)) for counter in (*COUNTERS, "other")]
        told = (str(each.runs), str(each.reached), str(each.kills), str(each.tasks), *counters)
        rows.append((name, *told, str(each.second_runs), f"{each.slowest:.2f} s"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for part, *figures in rows:
        cells = [part.ljust(widths[0]), *map(str.rjust, figures, widths[1:])]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def turns(parts: Sequence[Sequence[Run]]) -> list[Run]:
    """The runs of all parts in turns, the parts with the longest runs first."""
    rounds = zip_longest(*sorted(parts, key=len))
    return [run for run in chain.from_iterable(rounds) if run is not None]


async def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of everything (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin nothing new after that time")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--part", action="append", choices=list(runs(0)), help="only this; more than once")
    parser.add_argument("--only", metavar="RUN", help="only the run with this seed")
    given = parser.parse_args(arguments)
    every = runs(given.seed)
    chosen = turns([every[part] for part in given.part or every])
    if given.only is not None:
        chosen = [run for run in chosen if run.seed == given.only]
    say(f"seed {given.seed}: {len(chosen)} runs")
    began = time.monotonic()
    chaos = Chaos(chosen, given.seed, given.minutes)
    await asyncio.gather(*(chaos.play() for _ in range(given.jobs)))
    played = sum(each.runs for each in chaos.sums.values())
    failed = sum(each.failed for each in chaos.sums.values())
    say(table(chaos.sums), f"{time.monotonic() - began:.0f} s, {len(chosen) - played} runs not begun")
    say(f"{played - failed} passed, {failed} failed")
    return 1 if failed or not played else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
