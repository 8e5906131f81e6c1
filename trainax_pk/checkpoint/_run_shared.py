"""A run of several processes, of which one writes."""

import signal
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PyTree

from trainax_pk._signals import Interrupts
from trainax_pk.checkpoint._load import Match
from trainax_pk.checkpoint._run import Run
from trainax_pk.checkpoint._run_base import AbstractRun, Point, Verdict
from trainax_pk.checkpoint._store import Checkpoint
from trainax_pk.checkpoint._team import Team


class SharedRun(AbstractRun):
    """A run in a folder that all of its processes see, and one of them writes to.

    That one decides when to save and when to end, and the others follow; a signal to any
    of them ends all. What goes wrong in one is raised in all.

    Attributes:
        team: The processes.
        run: The run as it is for one process; entered by the one that leads.
    """

    def __init__(self, team: Team, run: Run) -> None:
        self.team = team
        self.run = run
        self._interrupts = Interrupts()

    def __enter__(self) -> "SharedRun":
        own = self.run if self.team.leads else self._interrupts
        self._together(own.__enter__)
        return self

    def __exit__(self, *raised: Any) -> None:
        own = self.run if self.team.leads else self._interrupts
        own.__exit__(*raised)

    def restore(self, state: PyTree[Any]) -> Checkpoint | None:
        """The checkpoint that the process which leads has chosen, read by all."""
        found = None
        if self.team.leads:
            found = self._together(lambda: self.run.restore(state))
        else:
            self._together()
        (step,) = self.team.follow(-1 if found is None else found.step)
        if step < 0:
            return None
        if self.team.leads:
            self._together()
            return found
        found = self._together(lambda: self.run.read(step))
        self.run.start_at(step)
        return found

    def gap(self, done: int) -> int | None:
        """The same in all processes: a function of `done` and where the run began."""
        return self.run.gap(done)

    def note_updates(self, series: dict[str, Any]) -> None:
        """Writes lines of the metric log."""
        if self.team.leads:
            self.run.note_updates(series)

    def note_record(self, step: int, name: str, value: Any) -> None:
        """Writes a line of the metric log, with the next chunk."""
        if self.team.leads:
            self.run.note_record(step, name, value)

    def at_boundary(self, point: Point, *, reason: str | None = None) -> bool:
        """As in a run of one process; all do the same."""
        own = self.run.signal if self.team.leads else self._interrupts.received
        number = int(self.team.gather([own or 0]).max())
        verdict = Verdict(*self.team.follow(*self._judge(point, number, reason)))
        act = self.run.carry_out if self.team.leads else self._mimic
        if not (verdict.signal or verdict.over):
            act(point, verdict, reason)
            return False
        self._together(lambda: act(point, verdict, reason))
        if verdict.signal:
            self._interrupts.obeyed.set()
            self._interrupts.received = verdict.signal
            raise self._interrupts.end()
        return not verdict.finished

    def save(self, point: Point) -> None:
        """Saves now, due or not: what follows ends the run."""
        verdict = Verdict(*self.team.follow(*self._judge(point, signal.SIGTERM, None)))
        if self.team.leads:
            self._together(lambda: self.run.save(point))
        else:
            self._together(lambda: self._mimic(point, verdict, None))

    def load(self, step: int) -> Checkpoint | None:
        """A checkpoint, where all processes can read it."""
        found = self.run.load(step)
        readable = bool(self.team.gather([found is not None]).all())
        return found if readable else None

    def load_results(self, step: int) -> dict[str, PyTree[Any]]:
        """Results of callbacks, where all processes can read the same."""
        found = self.run.load_results(step)
        names = zlib.crc32("\n".join(sorted(found)).encode()) >> 1
        return found if len(set(self.team.gather([names])[:, 0].tolist())) == 1 else {}

    def keep_results(self, step: int, results: Mapping[str, PyTree[Any]]) -> None:
        """Writes results of callbacks."""
        if self.team.leads:
            self.run.keep_results(step, results)

    def note_start(self, other: str, match: Match) -> None:
        """Writes what was taken over into the events."""
        if self.team.leads:
            self.run.note_start(other, match)

    def note_failure(self, message: str) -> None:
        """Writes the message into the events."""
        if self.team.leads:
            self.run.note_failure(message)

    def poll(self) -> None:
        """Nothing: one process cannot end by itself; all do after the chunk."""

    def _judge(self, point: Point, number: int, reason: str | None) -> list[int]:
        """What the process that leads decides; the others' part is not looked at."""
        if not self.team.leads:
            return [0] * len(Verdict._fields)
        return [int(x) for x in self.run.judge(point.done, number, reason)]

    def _mimic(self, point: Point, verdict: Verdict, reason: str | None) -> None:
        del reason
        self.run.mimic(point, verdict)

    def _together(self, work: Callable[[], Any] = lambda: None) -> Any:
        """Does something that may fail in one process, and then fails in all."""
        error, out = None, None
        try:
            out = work()
        except Exception as caught:
            error = caught
        self.team.check(error)
        return out
