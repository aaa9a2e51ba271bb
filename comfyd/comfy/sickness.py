"""Whether a ComfyUI that answers also works, as looks at its queue show (Q9); never asks it anything.

Its worker can die behind a living HTTP server, which then goes on accepting prompts. And a prompt can refuse
to be stopped. Only looks that were answered count: a time-out proves nothing (Q20).
"""

from typing import Final, Literal

import msgspec

from comfyd.comfy.sightings import QueueView

PARTS: Final = 3
"""A pause between two looks counts for a third of a limit at most: comfyd itself may have slept."""
CHANCE_FIRST_MS: Final = 60_000
CHANCE_MOST_MS: Final = 900_000
"""How long after it was found sick again a ComfyUI is given a prompt once more; doubles up to the second."""

Condition = Literal["well", "sick", "probation"]


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """One answered look at the queue. `at` is monotonic, in milliseconds."""

    view: QueueView
    ended: frozenset[str] = frozenset()
    """Prompts of ours whose end ComfyUI has announced."""
    life: int
    """Another number than before: ComfyUI may have been started anew."""
    falls: int
    """Another number than before: it was down meanwhile."""
    at: int


class _Spell:
    """For how long something was seen to be so."""

    def __init__(self, limit_ms: int) -> None:
        self._limit_ms = limit_ms
        self._seen_ms = 0
        self._last: int | None = None

    @property
    def over(self) -> bool:
        """Whether that is too long; never without a limit."""
        return 0 < self._limit_ms <= self._seen_ms

    def seen(self, at: int) -> None:
        """It is so."""
        if self._last is not None:
            self._seen_ms += min(at - self._last, max(self._limit_ms // PARTS, 1))
        self._last = at

    def gap(self) -> None:
        """Nobody knows whether it is: what passes until the next look does not count."""
        self._last = None


class Sickness:
    """What the looks at one ComfyUI add up to. Lives as long as the backend.

    `stuck_ms` is for how long prompts may wait while nothing runs, `stop_ms` for how long a prompt may go on
    that was asked to stop; 0 is 'for ever'.
    """

    def __init__(self, stuck_ms: int, stop_ms: int) -> None:
        self.condition: Condition = "well"
        self.reason: str | None = None
        """Why it is sick, in plain words; None unless it is."""
        self._stuck_ms = stuck_ms
        self._stop_ms = stop_ms
        self._life: int | None = None
        self._falls: int | None = None
        self._known: frozenset[str] = frozenset()
        self._stirred = False
        self._idled = False
        """Nothing ran when it was found sick, so that a queue without prompts is no cure."""
        self._idle = _Spell(stuck_ms)
        self._ended: dict[str, _Spell] = {}
        self._asked: dict[str, _Spell] = {}
        self._chances = 0
        self._chance_at = 0

    @property
    def on_probation(self) -> bool:
        """It was sick, nobody knows whether it still is, and one prompt is to show."""
        return self.condition == "probation"

    @property
    def look_every_ms(self) -> int | None:
        """How often the queue has to be looked at for the limits to mean something; None if they are off."""
        limits = [limit for limit in (self._stuck_ms, self._stop_ms) if limit]
        return min(limits) // (2 * PARTS) if limits else None

    def stirred(self) -> None:
        """There was a sign that something is executed."""
        self._stirred = True

    def asked_to_stop(self, prompt_id: str) -> None:
        """ComfyUI was asked to stop this prompt, and answered."""
        if self._stop_ms:
            self._asked.setdefault(prompt_id, _Spell(self._stop_ms))

    def unanswered(self) -> None:
        """A look was not answered."""
        for spell in (self._idle, *self._ended.values(), *self._asked.values()):
            spell.gap()

    def looked(self, look: Look) -> None:
        """A look was answered."""
        stirred, self._stirred = self._stirred, False
        present = frozenset((*look.view.running, *look.view.pending))
        renewed = self._renewed(look, present)
        self._life, self._falls, self._known = look.life, look.falls, present
        self._measure(look, stirred=stirred)
        self._judge(look, works=renewed or stirred or bool(look.view.running))

    def _renewed(self, look: Look, present: frozenset[str]) -> bool:
        """Whether it was started anew since the last look: it has forgotten every prompt then (Q13).

        One whose socket broke has not, but where it had none, only a fall tells the two apart.
        """
        if not self._known:
            return look.falls != self._falls
        return look.life != self._life and self._known.isdisjoint(present)

    def _measure(self, look: Look, *, stirred: bool) -> None:
        running, pending, at = look.view.running, look.view.pending, look.at
        if pending and not running and not stirred:
            self._idle.seen(at)
        else:
            self._idle = _Spell(self._stuck_ms)
        self._ended = {
            prompt_id: self._ended.get(prompt_id) or _Spell(self._stuck_ms)
            for prompt_id in running
            if prompt_id in look.ended
        }
        self._asked = {
            prompt_id: spell for prompt_id, spell in self._asked.items() if prompt_id in self._known
        }
        waited_for = [self._asked[prompt_id] for prompt_id in running if prompt_id in self._asked]
        for spell in (*self._ended.values(), *waited_for):
            spell.seen(at)

    def _judge(self, look: Look, *, works: bool) -> None:
        if self._idle.over:
            self._suspend_chance(look.at)
            limit = _seconds(self._stuck_ms)
            self._fall_sick(f"prompts have waited for {limit} and nothing runs", idle=True)
        elif (reason := self._stuck()) is not None:
            self._fall_sick(reason, idle=False)
        elif self.condition == "sick" and self._idled and not works:
            # Whoever took the prompts back proved nothing: it may try one, and not one after the other.
            if not look.view.pending and look.at >= self._chance_at:
                self.condition, self.reason = "probation", None
        elif self.condition == "sick" or works:
            self.condition, self.reason = "well", None
            self._chances = 0

    def _stuck(self) -> str | None:
        """What is wrong with a prompt that runs, if something is."""
        for prompt_id, spell in self._ended.items():
            if spell.over:
                return (
                    f"prompt {prompt_id} ended and has been in its queue for {_seconds(self._stuck_ms)} since"
                )
        for prompt_id, spell in self._asked.items():
            if spell.over:
                return f"prompt {prompt_id} runs on, asked to stop for {_seconds(self._stop_ms)}"
        return None

    def _suspend_chance(self, at: int) -> None:
        """The first one comes as soon as its queue is empty, each further one later."""
        if self.condition == "sick" and self._idled:
            return
        pause = CHANCE_FIRST_MS << (self._chances - 1) if self._chances else 0
        self._chance_at = at + min(pause, CHANCE_MOST_MS)
        self._chances = min(self._chances + 1, 8)

    def _fall_sick(self, reason: str, *, idle: bool) -> None:
        self.condition, self._idled = "sick", idle
        self.reason = f"sick: it answers but does not work, {reason}"


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:g} s"
