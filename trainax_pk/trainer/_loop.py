"""The training loop."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree
from tqdm.auto import tqdm

from trainax_pk.callback import Context
from trainax_pk.checkpoint import SaveFailed, Start
from trainax_pk.checkpoint._run_base import AbstractRun, Point
from trainax_pk.checkpoint._writer import Frozen
from trainax_pk.data import ShuffledOrder
from trainax_pk.engine import ChunkClock, Engine, chunk_size
from trainax_pk.step import TrainState
from trainax_pk.trainer._failure import (
    Skips,
    explain_failure,
    explain_params,
    leave_out,
    stays_finite,
)
from trainax_pk.trainer._history import History, HistoryBuilder
from trainax_pk.trainer._saved import fill_state, freeze, thaw
from trainax_pk.trainer._watch import Watch


class Loop:
    """One run of a trainer: what changes while it trains.

    Attributes:
        trainer: Whose settings; never changed.
        run: Where it lives.
        state: Where training stands.
        done: Number of updates done.
        stopped: Whether a segment ended it for now.
    """

    def __init__(
        self,
        trainer: Any,
        model: PyTree[Any],
        key: PRNGKeyArray,
        run: AbstractRun,
        start: Start | None = None,
    ) -> None:
        order_key, state_key = jax.random.split(key)
        self.trainer = trainer
        self.run = run
        order = ShuffledOrder(len(trainer.windows), trainer.batch_size, order_key)
        self.order = trainer.devices.place_order(order, trainer.windows)
        state = TrainState.create(
            model,
            trainer.optimizer,
            key=state_key,
            trainable=trainer.trainable,
            ema=trainer.ema,
        )
        self.state = trainer.devices.place_state(state)
        self.done, self.total = 0, trainer.num_training_steps
        self.stopped = False
        self._start, self._match = start, None
        self._engine: Engine = trainer.engine
        self._planned = self.total
        # What callbacks returned here when the run was finished.
        self._known: dict[str, PyTree[Any]] = {}
        self._history = HistoryBuilder()
        self._watch = Watch(trainer.monitors, trainer.early_stopping)
        # Where the first failure ends the run, none is skipped.
        self._skips = Skips(0 if trainer.raises else trainer.max_skipped)

    def train(self) -> tuple[PyTree[Any], History]:
        """Runs to the end, or to where it stops."""
        try:
            return self._train()
        except SaveFailed as error:
            error.model = self.state.model
            raise

    def _train(self) -> tuple[PyTree[Any], History]:
        team, total = self.trainer.devices.team, self.total
        # Traced once for all, a run has no time that could be measured.
        traced = any(
            isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self.state)
        )
        clock = ChunkClock(64 if traced else 1)
        size = chunk_size(longest_gap(self.trainer), _batch_bytes(self.trainer))
        # Not `disable=False`, which would overrule the user's TQDM_DISABLE.
        silent = {} if self.trainer.progress and team.leads else {"disable": True}
        bar = tqdm(total=total, mininterval=0.2, **silent)
        with team.guarded(), self.run, bar:
            self._restore()
            bar.update(self.done)
            while not self._is_over():
                (limit,) = team.follow(clock.limit(size))
                gaps = (self._gap(), limit, self.run.gap(self.done))
                count = int(min(gap for gap in gaps if gap is not None))
                clock.begin()
                records = self._advance(count, size)
                clock.end(count)
                _show(bar, count, records)
                self.stopped = self.run.at_boundary(self._point())
            best = self._best_state()
        engine, forms = self._engine, self._forms()
        history = self._history.build(
            self.state, engine.describe(), forms, self._watch.best(), self._match
        )
        return best.model, history

    def _is_over(self) -> bool:
        """Calls the callbacks that are due; whether there is nothing more to do."""
        if self.stopped:
            return True
        results, fresh = self._call_back()
        reason = self._watch.reason
        if self.done < self.total and reason is None:
            return False
        if self.done < self.total:
            self.run.at_boundary(self._point(), reason=reason)
        if fresh:
            self.run.keep_results(self.done, results)
        return True

    def _advance(self, count: int, size: int) -> PyTree[Array]:
        """Does one chunk of updates."""
        records = self._update(count, size)
        self._history.add_chunk(records)
        self.run.note_updates(records)
        return records

    def _update(self, count: int, size: int) -> PyTree[Array]:
        before = self.state
        new, records = self._engine.run(before, self.order, self.done, count, size)
        if self.trainer.devices.team.size > 1:
            jax.block_until_ready(new)
            records = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), records)
        if not self._check(before, new, records):
            if count > 1:
                # The same programs find the update, so that the bits are those of other
                # chunks: in halves, some dozen calls for each update that fails.
                lengths = (count // 2, count - count // 2)
                parts = [jax.device_get(self._update(n, size)) for n in lengths]
                return jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *parts)
            new = leave_out(before)
        self.state = new
        self.done += count
        return records

    def _restore(self) -> None:
        found = self.run.restore(self.state)
        if found is None:
            if self._start is not None:
                self.state, self._match = self._start.apply(self.state)
                self.run.note_start(str(self._start.run_dir), self._match)
            return
        self.done = found.step
        self.state = fill_state(found, self.state)
        series, records = thaw(found, self._history)
        self._watch.restore(records)
        self._skips.restore(series, found.meta.get("left_out", ()))
        self._planned = found.meta["num_updates"]
        self._known = self.run.load_results(self.done)
        self._engine = self.trainer.engine_of(found.meta["program"], self._planned)

    def _point(self) -> Point:
        return Point(self.done, self._freezer(self.state, self.done), self._best_points)

    def _best_points(self) -> dict[int, Callable[[], Frozen] | None]:
        states = self._watch.states
        return {
            step: self._freezer(states[step], step) if step in states else None
            for step in self._watch.best_steps
        }

    def _freezer(self, state: TrainState, step: int) -> Callable[[], Frozen]:
        def begin() -> Frozen:
            program = self._engine.choice.family
            facts = {"program": program, "num_updates": self._planned}
            facts["left_out"] = [i for i in self._skips.left_out if i < step]
            held = self.trainer.devices.whole(state)
            return freeze(held, self._history, step, facts)

        return begin

    def _best_state(self) -> TrainState:
        """The state to return: the last, or with early stopping the best."""
        step = self._watch.restored_step
        if self.stopped or step is None or step == self.done:
            return self.state
        if step in self._watch.states:
            return self._watch.states[step]
        found = self.run.load(step)
        if found is None:
            warnings.warn(
                f"The checkpoint of the best step, {step}, is not there any more; the "
                f"model of step {self.done} is returned.",
                RuntimeWarning,
                stacklevel=4,
            )
            return self.state
        return fill_state(found, self.state)

    def _forms(self) -> dict[str, PyTree[Any]]:
        """Results of callbacks that ran in another process alone, for their form."""
        missing = [c for c in self.trainer.callbacks if self._history.lacks(c.name)]
        return {c.name: c(self._context()) for c in missing}

    def _gap(self) -> int:
        """Updates until a callback is due, or the end."""
        gaps = [c.every - self.done % c.every for c in self.trainer.callbacks]
        return min([*gaps, self.total - self.done])

    def _context(self) -> Context:
        done, order = self.done, self.order
        # One process cannot end alone, nor look up at its own pace.
        poll = self.run.poll if self.trainer.devices.team.size == 1 else None
        return Context(done, self.state, lambda: self._engine.batch(order, done), poll)

    def _call_back(self) -> tuple[dict[str, PyTree[Any]], bool]:
        """Results of the callbacks that are due, and whether one of them ran."""
        context, results = self._context(), {}
        # Of the step at which the run was taken up alone.
        known, self._known = self._known, {}
        for callback in self.trainer.callbacks:
            self.run.poll()
            if self.done == self.total or self.done % callback.every == 0:
                name = callback.name
                value = known[name] if name in known else self._asked(callback, context)
                value = self._kept(name, value)
                self.run.note_record(self.done, callback.name, value)
                results[callback.name] = value
        self._watch.see(self.done, results, self.state)
        return results, not results.keys() <= known.keys()

    def _asked(self, callback: Any, context: Context) -> PyTree[Any]:
        try:
            return callback(context)
        except Exception:
            # Whatever it is, it costs no update. Of several processes the others know
            # nothing of it, and would not join in a save.
            if self.trainer.devices.team.size == 1:
                self.run.save(self._point())
            raise

    def _kept(self, name: str, value: PyTree[Any]) -> PyTree[Any]:
        try:
            value = self.trainer.devices.whole(value)
            return self._history.add_record(name, self.done, value)
        except ValueError:
            # The callback is at fault, and costs no update.
            self.run.save(self._point())
            raise

    def _check(
        self, before: TrainState, new: TrainState, records: PyTree[Array]
    ) -> bool:
        """The one host round trip of a chunk; whether it is to be kept as it is."""
        if not self.trainer.watched or isinstance(records["loss"], jax.core.Tracer):
            jax.block_until_ready(records)
            return True
        kept = stays_finite(new.params, before.params)
        series, kept = jax.device_get((records, kept))
        count = len(series["loss"])
        if not (kept or self.trainer.raises or count == 1):
            return False
        message = self._skips.see(self.done, series, kept=bool(kept))
        if self.trainer.raises and message is not None:
            # The norm of a large but finite gradient may overflow: that is no failure.
            message = self._explain(before, count)
            if message is None and not kept:
                message = explain_params(new.params, self.done, count)
        if message is not None:
            self.run.note_failure(message)
            raise FloatingPointError(message)
        return bool(kept)

    def _explain(self, before: TrainState, count: int) -> str | None:
        return explain_failure(
            self.trainer.step_fn,
            self.trainer._descend(),
            self.trainer._fast_step,
            before,
            lambda i: self._engine.batch(self.order, i),
            lambda i: self.order.indices(i, 1)[0],
            self.done,
            count,
        )


def longest_gap(trainer: Any) -> int:
    """Most updates that one chunk may hold."""
    longest = min([c.every for c in trainer.callbacks], default=math.inf)
    if trainer.windows.residency == "disk":
        longest = min(longest, trainer.windows.chunk_size(trainer.batch_size))
    return int(min(longest, trainer.num_training_steps))


def _batch_bytes(trainer: Any) -> int:
    """What a chunk holds per update: windows' indices, or the windows themselves."""
    if trainer.windows.residency == "device":
        return 4 * trainer.batch_size
    return trainer.batch_size * trainer.windows.item_bytes


def _show(bar: Any, count: int, records: PyTree[Array]) -> None:
    loss = records["loss"]
    if not bar.disable and not isinstance(loss, jax.core.Tracer):
        bar.set_postfix(loss=f"{float(loss[-1]):.3e}", refresh=False)
    bar.update(count)
