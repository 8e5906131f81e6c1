"""Trials of a sweep that train as one program."""

import json
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from tqdm.auto import tqdm

from trainax_pk._files import LocalFiles
from trainax_pk._signals import Interrupts
from trainax_pk.callback import Context
from trainax_pk.data import ShuffledOrder
from trainax_pk.engine import (
    ChunkClock,
    Engine,
    chunk_size,
    inspect_work,
    make_feed,
)
from trainax_pk.engine._members import TINY, split_members
from trainax_pk.experiment._artifact import write_artifact
from trainax_pk.experiment._numbers import (
    NumberedFeed,
    finite_rows,
    numbers_of,
    step_of,
    with_numbers,
)
from trainax_pk.experiment._objective import objective
from trainax_pk.experiment._run import Made, assemble, build_with, make_model
from trainax_pk.experiment._saved import read_arrays, save_arrays, write_metrics
from trainax_pk.experiment._sweep_spec import HyperSweep, Trial
from trainax_pk.step import TrainState
from trainax_pk.trainer import History
from trainax_pk.trainer._mesh import MEMBERS

_PROMISE = "the sweep saves and ends after this chunk"
_LOSS = "the sweep ends without saving"


class Members:
    """Trials that differ in seeds and numbers, trained as one program.

    Their order, weights and updates are those that each would have alone. One whose loss
    or weights are not finite ends there; the others go on as if it had not been. Several
    devices share them, as many as their number can be divided by.

    Attributes:
        trials: Those that are still in it.
        failed: Numbers of trials that are not finite, and the update.
        done: Number of updates done.
    """

    def __init__(
        self,
        spec: HyperSweep,
        trials: Sequence[Trial],
        made: Made,
        file: Path,
        devices: Sequence[jax.Device],
    ) -> None:
        """Begins, or goes on where a file says.

        Args:
            spec: The sweep.
            trials: Alike; those that are left.
            made: Their data.
            file: For the state on the way.
            devices: Where they train.
        """
        self.trials = list(trials)
        self.failed: dict[int, int] = {}
        self.done = 0
        self._spec, self._made = spec, made
        self._base = trials[0].run
        self._devices = tuple(devices)
        self._series: list[dict[str, np.ndarray]] = []
        self._records: list[tuple[int, dict[str, Any]]] = []
        self._file = file
        self._seconds, self._saved = 0.0, time.monotonic()
        self._whole = threading.Lock()
        self._program = ""
        self._states: list[TrainState] | None = None
        self._raises = self._base.training.nonfinite == "raise"
        self._arrange()
        self._begin()
        self._settle_form()

    def advance(self, stop: int, *, progress: bool = False) -> dict[int, float]:
        """Trains up to an update.

        Args:
            stop: Number of updates done then.
            progress: Show a bar.

        Returns:
            What trials are ranked by, NaN for those that failed.

        Raises:
            KeyboardInterrupt: SIGINT, after saving; SIGTERM raises SystemExit(143).
        """
        clock, size = ChunkClock(), self._chunk()
        silent = {} if progress else {"disable": True}
        with (
            Interrupts(self.save, promise=_PROMISE, loss=_LOSS) as interrupts,
            tqdm(total=stop - self.done, mininterval=0.2, **silent) as bar,
        ):
            while self.done < stop and len(self.failed) < len(self.trials):
                if interrupts.received is not None:
                    break
                began = time.perf_counter()
                self._call_back()
                count = min(stop - self.done, clock.limit(size), self._gap())
                clock.begin()
                self._chunk_of(count, size)
                clock.end(count)
                bar.update(count)
                self._seconds += time.perf_counter() - began
                if time.monotonic() - self._saved > self._base.training.save_seconds:
                    self.save()
            if self.done == self.total:
                self._call_back()
            interrupts.saving = True
            interrupts.obeyed.set()
            self.save()
        if interrupts.received is not None:
            raise interrupts.end()
        return self._values()

    def keep(self, numbers: set[int]) -> None:
        """Lets the others go."""
        rows = [i for i, t in enumerate(self.trials) if t.number in numbers]
        if not rows or len(rows) == len(self.trials):
            self.trials = [self.trials[i] for i in rows]
            return
        self._take(np.asarray(rows))
        if self._num_shares() != self._shares:
            self._arrange()
            place = self._built.trainer.devices.members or self._devices[0]
            self._state = jax.device_put(self._state, place)
            self._settle_form()
        self.save()

    def finish(self, trial: Trial, folder: Path) -> dict[str, Any]:
        """Leaves artifact, weights and metrics of a trial in its folder."""
        i = self.trials.index(trial)
        if self._states is None:
            mapped = jax.tree.map(lambda _: 0, self._state)
            self._states = split_members(self._state, mapped, len(self.trials))
        state = self._states[i]
        series = {
            k: np.concatenate([s[k][i] for s in self._series]) for k in self._series[0]
        }
        history = History(
            jnp.asarray(series["loss"]),
            jnp.asarray(series["grad_norm"]),
            {},
            state,
            self._program,
        )
        write_metrics(folder, self._base.training.log_every, series, self._records, i)
        parts = assemble(trial.run, self._made)
        built = self._built._replace(run=trial.run, trainer=parts)
        seconds = self._seconds / len(self.trials)
        return write_artifact(built, state.model, history, seconds, folder)

    def save(self) -> None:
        """Writes where training stands; in another thread if this one is deaf."""
        # Facts and arrays of the same update: chunks end in the main thread.
        with self._whole:
            facts = {
                "trials": [t.number for t in self.trials],
                "failed": self.failed,
                "done": self.done,
                "seconds": self._seconds,
                "program": self._program,
                "records": [[step, sorted(values)] for step, values in self._records],
            }
            save_arrays(self._file, self._parts(), json.dumps(facts))
        self._saved = time.monotonic()

    def forget(self) -> None:
        """Removes what is needed for going on."""
        LocalFiles(self._file.parent).remove(self._file.name)

    def _arrange(self) -> None:
        """What depends on how many devices share the members."""
        self._shares, mesh = self._num_shares(), None
        if self._shares > 1:
            mesh = Mesh(np.array(self._devices[: self._shares]), (MEMBERS,))
        self._built = build_with(self._base, self._made, mesh=mesh)
        trainer = self._built.trainer
        self.total = trainer.num_training_steps
        self._feed = feed = NumberedFeed(make_feed(trainer.windows, self.total))
        options = {"num_updates": self.total, "program": trainer._program}
        options["split"] = trainer.devices.members
        self._engine = Engine(self._step, feed, raises=self._raises, **options)
        # What runs where a member is not finite: XLA's grouped convolutions multiply by
        # masks, and 0·NaN would reach the other members.
        self._apart = Engine(self._step, feed, **(options | {"split": None}))
        self._apart.vmapped = False

    def _num_shares(self) -> int:
        counts = range(1, len(self._devices) + 1)
        return max(n for n in counts if len(self.trials) % n == 0)

    def _begin(self) -> None:
        run, n = self._base, len(self._built.trainer.windows)
        self._numbers = numbers_of(self.trials)
        keys = jnp.stack([jax.random.key(t.run.seed) for t in self.trials])

        def create(key: Array, numbers: dict[str, Array]) -> Any:
            model_key, key = jax.random.split(key)
            model = make_model(run, model_key)
            model = getattr(run.model, "fitted", lambda m, _: m)(
                model, self._made.split.train
            )
            order_key, state_key = jax.random.split(key)
            optimizer = assemble(with_numbers(run, numbers), self._made).optimizer
            ema = run.training.ema_decay is not None
            state = TrainState.create(model, optimizer, key=state_key, ema=ema)
            return state, ShuffledOrder(n, run.training.batch_size, order_key)

        self._state, self._orders = eqx.filter_vmap(create)(keys, self._numbers)
        found = read_arrays(self._file)
        facts = {"trials": []} if found is None else json.loads(found.note)
        if all(t.number in facts["trials"] for t in self.trials):
            self._restore(found, facts)

    def _settle_form(self) -> None:
        """Vmapped where updates are dispatched one by one, and hardly compute anything.

        That is certain, and the engine would measure it.
        """
        if self._base.training.program != "loop":
            return
        one = jax.tree.map(lambda x: x[0], (self._state, self._numbers, self._orders))
        arrays = self._feed.load(one[1:], 0, 1, 1)
        jaxpr = jax.make_jaxpr(lambda s, a: self._step(s, self._feed.single(a, 0, 0)))(
            one[0], arrays
        )
        if inspect_work(jaxpr).multiply_adds <= TINY:
            self._engine.vmapped = True

    def _parts(self) -> PyTree[Any]:
        series = {}
        if self._series:
            series = {
                k: np.concatenate([s[k] for s in self._series], axis=1)
                for k in self._series[0]
            }
        return {
            "state": self._state,
            "series": series,
            "records": [values for _, values in self._records],
        }

    def _restore(self, found: Any, facts: dict[str, Any]) -> None:
        self.done, self._seconds = facts["done"], facts["seconds"]
        self._program = facts["program"]
        self.failed = {int(k): v for k, v in facts["failed"].items()}
        # Others may have gone since it was written.
        rows = np.asarray([facts["trials"].index(t.number) for t in self.trials])

        def own(place: str, form: Any) -> Any:
            return jax.tree.map(lambda x: x[rows], found.like(place, form))

        self._state = own("['state']", self._state)
        if self.done:
            names, kept = ("loss", "grad_norm"), found.arrays
            self._series = [{k: kept[f"['series']['{k}']"][rows] for k in names}]
        form = self._evaluated() if facts["records"] else {}
        for i, (step, names) in enumerate(facts["records"]):
            part = {name: form[name] for name in names}
            self._records.append((step, own(f"['records'][{i}]", part)))

    def _step(self, state: TrainState, batch: Any) -> Any:
        numbers, windows = batch
        run = with_numbers(self._base, numbers)
        return step_of(run, assemble(run, self._made))(state, windows)

    def _run(self, engine: Engine, count: int, size: int) -> Any:
        def chunk(state: TrainState, order: Any) -> Any:
            return engine.run(state, order, self.done, count, size)

        return eqx.filter_vmap(chunk)(self._state, (self._numbers, self._orders))

    def _chunk_of(self, count: int, size: int) -> None:
        engine = self._engine
        try:
            state, records = self._run(engine, count, size)
        except FloatingPointError:
            engine = self._apart
            state, records = self._run(engine, count, size)
        records = jax.device_get(records)
        with self._whole:
            self._state, self._program = state, engine.describe()
            self._series.append(records)
            self.done += count
            if self._raises:
                self._note_failures(records["loss"], count)

    def _note_failures(self, loss: np.ndarray, count: int) -> None:
        finite = np.isfinite(loss).all(axis=1) & finite_rows(self._state.params)
        healthy = np.flatnonzero(finite)
        rows = np.arange(len(self.trials))
        for i in np.flatnonzero(~finite):
            bad = np.flatnonzero(~np.isfinite(loss[i]))
            at = self.done - count + int(bad[0]) if bad.size else self.done
            self.failed.setdefault(self.trials[i].number, at)
            if healthy.size:
                # A double of a healthy one takes its place: shapes stay as they are.
                rows[i] = healthy[0]
        if (rows != np.arange(len(rows))).any():
            self._move(rows)

    def _take(self, rows: np.ndarray) -> None:
        self.trials = [self.trials[i] for i in rows]
        self._series = [{k: x[rows] for k, x in s.items()} for s in self._series]
        self._records = [
            (step, jax.tree.map(lambda x: x[rows], values))
            for step, values in self._records
        ]
        self._move(rows)

    def _move(self, rows: np.ndarray) -> None:
        moved = (self._state, self._orders, self._numbers)
        moved = jax.tree.map(lambda x: x[rows], moved)
        self._state, self._orders, self._numbers = moved

    def _values(self) -> dict[int, float]:
        def value(state: TrainState, numbers: dict[str, Array]) -> Array:
            parts = assemble(with_numbers(self._base, numbers), self._made)
            measure = objective(
                self._spec.rank_by,
                parts.configuration,
                self._made.split,
                use_ema=self._spec.use_ema,
            )
            return measure(state)

        values = np.asarray(
            eqx.filter_jit(eqx.filter_vmap(value))(self._state, self._numbers)
        )
        return {
            t.number: math.nan if t.number in self.failed else float(x)
            for t, x in zip(self.trials, values, strict=True)
        }

    def _chunk(self) -> int:
        gaps = [c.every for c in self._base.callbacks]
        return chunk_size(min([*gaps, self.total]), 4 * self._base.training.batch_size)

    def _gap(self) -> int:
        gaps = [c.every - self.done % c.every for c in self._base.callbacks]
        return min([*gaps, self.total - self.done])

    def _call_back(self) -> None:
        last = self.done == self.total
        due = [c.name for c in self._callbacks if last or self.done % c.every == 0]
        seen = bool(self._records) and self._records[-1][0] == self.done
        if due and not seen:
            found = self._evaluated()
            self._records.append((self.done, {name: found[name] for name in due}))

    @property
    def _callbacks(self) -> list[Any]:
        return self._built.trainer.callbacks

    def _evaluated(self) -> dict[str, Any]:
        """What all callbacks say of all members, on the host."""
        windows = self._built.trainer.windows
        fixed = not any(name.startswith("configuration.") for name in self._numbers)

        def evaluate(state: TrainState, order: Any, numbers: dict[str, Array]) -> Any:
            rows = order.indices(self.done, 1)[0]
            context = Context(
                self.done, state, lambda: windows.gather(windows.arrays, rows)
            )
            callbacks = self._callbacks
            if not fixed:
                parts = assemble(with_numbers(self._base, numbers), self._made)
                callbacks = [
                    c.build(parts.configuration, self._made.split)
                    for c in self._base.callbacks
                ]
            return {c.name: c(context) for c in callbacks}

        found = eqx.filter_vmap(evaluate)(self._state, self._orders, self._numbers)
        return jax.device_get(found)
