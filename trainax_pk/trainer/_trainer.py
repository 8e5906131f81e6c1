"""The training loop."""

import math
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree
from tqdm.auto import tqdm

from trainax_pk._tree import check_count, check_flag
from trainax_pk.callback import AbstractCallback, Context
from trainax_pk.checkpoint import Policy, Segment
from trainax_pk.checkpoint._identity import describe
from trainax_pk.checkpoint._run import AbstractRun, NoRun, Run
from trainax_pk.configuration import AbstractConfiguration
from trainax_pk.data import Samples, ShuffledOrder, Trajectories, as_items
from trainax_pk.engine import ChunkClock, Engine, chunk_size, make_feed
from trainax_pk.step import TrainState, make_train_step
from trainax_pk.trainer._checks import check_callbacks, window_steps
from trainax_pk.trainer._failure import explain_failure
from trainax_pk.trainer._history import History, HistoryBuilder
from trainax_pk.trainer._saved import freeze, identify, thaw


class Trainer:
    """Trains a model on windows of trajectories, or on samples.

    `trainer(model, key=key)` returns `(model, history)`. The data stay on the device as
    trajectories; windows are gathered inside the compiled program, in an order that is
    a pure function of the key and the number of the update. Every batch has the same
    size; batches run across the borders of epochs. The engine picks the faster of two
    program families once (`history.program`).

    Under `eqx.filter_vmap`, or with `ensemble=True`, all members train at once where that
    is faster, and one after another where it is not; the results are those of the
    members alone.

    With `run_dir=` a run survives: killed at any instant and called again, it ends in
    the same bits (docs/checkpoints.md).
    """

    def __init__(
        self,
        data: Trajectories | Samples | PyTree[Array],
        configuration: AbstractConfiguration,
        *,
        optimizer: optax.GradientTransformation,
        num_training_steps: int,
        batch_size: int,
        callbacks: Sequence[AbstractCallback] = (),
        trainable: Any = None,
        accumulate: int = 1,
        max_grad_norm: float | None = None,
        compute_dtype: Any = None,
        ema_decay: float | None = None,
        nonfinite: str = "raise",
        window_stride: int = 1,
        residency: str = "auto",
        program: str = "auto",
        checkpoints: Policy | None = None,
        log_every: int = 100,
        progress: bool = True,
    ) -> None:
        """Checks everything; computes nothing.

        Args:
            data: Trajectories, leaves `(num_samples, num_times, ...)`; or what is
                trained on whole: `tx.data.Samples`, or a `tx.Batch1D` or `tx.Batch2D`
                that holds all data; or a `SimulationDataset` or `CachedDataset`.
            configuration: The compute graph of the loss.
            optimizer: An optax transformation.
            num_training_steps: Number of updates.
            batch_size: Windows per update.
            callbacks: What looks at training on the way.
            trainable: Which leaves train, as for `TrainState.create`.
            accumulate: As for `make_train_step`.
            max_grad_norm: As for `make_train_step`.
            compute_dtype: As for `make_train_step`.
            ema_decay: As for `make_train_step`; the average is
                `history.state.ema_model`.
            nonfinite: "raise" (FloatingPointError naming update and leaves), "skip" or
                "ignore".
            window_stride: Distance between the first times of windows.
            residency: "device", "host", "disk" for a `CachedDataset` that is streamed,
                or "auto": host where the data do not fit on the device, disk where a
                `CachedDataset` exceeds its memory budget.
            program: "loop", "scan", or "auto": measured where no rule decides.
            checkpoints: When a run with a `run_dir` is saved, and what is kept.
            log_every: Updates per line of its metric log.
            progress: Whether to show a bar with loss and updates per second.

        Raises:
            ValueError: Any of these out of range, data that are not finite or too short
                for the configuration, a batch larger than the data.

        Example:
            >>> import equinox as eqx
            >>> import jax
            >>> import optax
            >>> import trainax_pk as tx
            >>> data = tx.sample_data.advection_1d_periodic(key=jax.random.key(0))
            >>> model = eqx.nn.Conv1d(
            ...     1, 1, 2, padding="SAME", padding_mode="CIRCULAR",
            ...     key=jax.random.key(1),
            ... )
            >>> trainer = tx.trainer.Trainer(
            ...     data, tx.configuration.Supervised(2), optimizer=optax.adam(1e-2),
            ...     num_training_steps=50, batch_size=32, progress=False,
            ... )
            >>> model, history = trainer(model, key=jax.random.key(2))
            >>> history.loss.shape, bool(history.loss[-1] < history.loss[0])
            ((50,), True)
        """
        self.num_training_steps = check_count("num_training_steps", num_training_steps)
        self.batch_size = check_count("batch_size", batch_size)
        self.progress = check_flag("progress", progress)
        self.log_every = check_count("log_every", log_every)
        self.checkpoints = Policy() if checkpoints is None else checkpoints
        self.callbacks = check_callbacks(callbacks)
        options = {
            "accumulate": accumulate,
            "max_grad_norm": max_grad_norm,
            "compute_dtype": compute_dtype,
            "ema_decay": ema_decay,
        }
        self.step_fn = make_train_step(
            configuration, optimizer, nonfinite=nonfinite, **options
        )
        # Guarding every update costs a tenth to a quarter of a small one. Where the run
        # ends at the first failure anyway, chunks run unguarded and their records tell.
        fast = "ignore" if nonfinite == "raise" else nonfinite
        fast_step = make_train_step(configuration, optimizer, nonfinite=fast, **options)
        self.configuration = configuration
        self.optimizer = optimizer
        self.trainable = trainable
        self.ema = ema_decay is not None
        self.raises = nonfinite == "raise"
        self._fast_step = fast_step
        self._program = program
        # What a run is compared by, beside data, model and key.
        self._parts = {
            "configuration": configuration,
            "optimizer": optimizer,
            "batch_size": batch_size,
            "nonfinite": nonfinite,
            "program": program,
            **options,
        }
        self._data_fields: dict[str, str] | None = None
        self.windows = as_items(
            data,
            lambda trajectories: window_steps(configuration, trajectories),
            stride=window_stride,
            only_initial=configuration.num_times == 1,
            residency=residency,
        )
        # Raises before any compute when a batch is larger than the data, or too large
        # for the memory budget.
        ShuffledOrder(len(self.windows), batch_size, jax.random.key(0))
        self._longest_gap()
        self.engine = Engine(
            fast_step,
            make_feed(self.windows, num_training_steps),
            num_updates=num_training_steps,
            program=program,
            raises=self.raises,
        )

    def __call__(
        self,
        model: PyTree[Any],
        *,
        key: PRNGKeyArray,
        ensemble: bool = False,
        run_dir: str | os.PathLike[str] | None = None,
        segment: Segment | None = None,
        allow_changes: Iterable[str] = (),
    ) -> tuple[PyTree[Any], History]:
        """Trains a model.

        Args:
            model: Where to start; with `ensemble`, models stacked along a leading axis
                of their arrays, as `eqx.filter_vmap` makes them.
            key: Key of order and noise; with `ensemble`, one for each member.
            ensemble: Train a stack of models.
            run_dir: Folder in which the run lives. Where it is new the run starts; where
                a run lies there it goes on at the very update, bitwise as if it had not
                been interrupted; one that is finished is returned at once, and goes on
                if `num_training_steps` has grown.
            segment: Stop after so many epochs or minutes; call again to go on.
            allow_changes: Names of fields in which the run may differ from what it was
                begun with, such as "optimizer".

        Returns:
            The trained model, and the history; stacked for an ensemble.

        Raises:
            FloatingPointError: A loss or gradient was not finite; the message names the
                update, its windows and the leaves.
            ValueError: A model without trainable leaves, or that changes the state's
                shape or dtype; `run_dir` for an ensemble; RunChanged where `run_dir`
                holds a run of something else.
            CheckpointDamaged: `run_dir` holds checkpoints, and none is valid.
            TimeoutError: Another process is at work in `run_dir`.
            KeyboardInterrupt: SIGINT, after saving; SIGTERM raises SystemExit(143).
        """
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(key))
        if run_dir is None:
            if segment is not None:
                raise ValueError(
                    "Expected `run_dir` with `segment`, got None. Name the folder from "
                    "which the run goes on later."
                )
            if not ensemble:
                return self._train(model, key, NoRun())
            return eqx.filter_vmap(lambda m, k: self._train(m, k, NoRun()))(model, key)
        if ensemble or traced:
            raise ValueError(
                "Expected one model with `run_dir`, got an ensemble. Train its members "
                "one by one, each in a folder of its own."
            )
        run = self._run(model, key, run_dir, segment, allow_changes)
        return self._train(model, key, run)

    def _run(
        self,
        model: PyTree[Any],
        key: PRNGKeyArray,
        run_dir: str | os.PathLike[str],
        segment: Segment | None,
        allow_changes: Iterable[str],
    ) -> Run:
        if self._data_fields is None:
            self._data_fields = describe(self.windows, "data")
        may = {
            "num_training_steps": self.num_training_steps,
            "callbacks": [c.name for c in self.callbacks],
            "log_every": self.log_every,
        }
        return Run(
            run_dir,
            policy=self.checkpoints,
            identity=identify(self._parts, self._data_fields, model, key, may),
            num_steps=self.num_training_steps,
            steps_per_epoch=Fraction(len(self.windows), self.batch_size),
            log_every=self.log_every,
            segment=segment,
            allow_changes=allow_changes,
        )

    def _train(
        self, model: PyTree[Any], key: PRNGKeyArray, run: AbstractRun
    ) -> tuple[PyTree[Any], History]:
        order_key, state_key = jax.random.split(key)
        order = ShuffledOrder(len(self.windows), self.batch_size, order_key)
        state = TrainState.create(
            model,
            self.optimizer,
            key=state_key,
            trainable=self.trainable,
            ema=self.ema,
        )
        history, clock = HistoryBuilder(), ChunkClock()
        done, total = 0, self.num_training_steps
        engine, planned = self.engine, total
        size = chunk_size(self._longest_gap(), self._batch_bytes())
        stopped = False
        with run, tqdm(total=total, disable=not self.progress, mininterval=0.2) as bar:
            found = run.restore(state)
            if found is not None:
                done, state = thaw(found, state, history)
                engine, planned = self._engine_of(found.meta), found.meta["num_updates"]
                bar.update(done)
            while done < total and not stopped:
                self._call_back(history, done, state, order, run)
                count = min(self._gap(done), clock.limit(size), run.gap(done) or size)
                clock.begin()
                before = state
                state, records = engine.run(state, order, done, count, size)
                self._check(before, records, order, done)
                clock.end(count)
                history.add_chunk(records)
                done += count
                _show(bar, count, records)
                run.note_updates(records)
                stopped = run.at_boundary(
                    done,
                    lambda s=state, n=done: freeze(
                        s,
                        history,
                        n,
                        {"program": engine.choice.family, "num_updates": planned},
                    ),
                )
            if not stopped:
                self._call_back(history, done, state, order, run)
        forms = self._forms(history, done, state, order)
        return state.model, history.build(state, engine.describe(), forms)

    def _engine_of(self, meta: Any) -> Engine:
        """The programs that a saved run was begun with: others differ in last bits."""
        family = self._program if self._program != "auto" else meta["program"]
        choice = self.engine.choice
        same = self._program == family or (choice and choice.family == family)
        if same and meta["num_updates"] == self.num_training_steps:
            return self.engine
        return Engine(
            self._fast_step,
            make_feed(self.windows),
            num_updates=meta["num_updates"],
            program=family,
            raises=self.raises,
        )

    def _forms(
        self, history: HistoryBuilder, done: int, state: TrainState, order: Any
    ) -> dict[str, PyTree[Any]]:
        """Results of callbacks that ran in another process alone, for their form."""
        context = Context(done, state, lambda: self.engine.batch(order, done))
        return {c.name: c(context) for c in self.callbacks if history.lacks(c.name)}

    def _gap(self, done: int) -> int:
        """Updates until a callback is due, or the end."""
        gaps = [c.every - done % c.every for c in self.callbacks]
        return min([*gaps, self.num_training_steps - done])

    def _longest_gap(self) -> int:
        longest = min([c.every for c in self.callbacks], default=math.inf)
        if self.windows.residency == "disk":
            longest = min(longest, self.windows.chunk_size(self.batch_size))
        return int(min(longest, self.num_training_steps))

    def _batch_bytes(self) -> int:
        """What a chunk holds per update: windows' indices, or the windows themselves."""
        if self.windows.residency == "device":
            return 4 * self.batch_size
        return self.batch_size * self.windows.item_bytes

    def _call_back(
        self,
        history: HistoryBuilder,
        done: int,
        state: TrainState,
        order: Any,
        run: AbstractRun,
    ) -> None:
        last = done == self.num_training_steps
        context = Context(done, state, lambda: self.engine.batch(order, done))
        for callback in self.callbacks:
            run.poll()
            if last or done % callback.every == 0:
                value = callback(context)
                history.add_record(callback.name, done, value)
                run.note_record(done, callback.name, value)

    def _check(
        self,
        before: TrainState,
        records: PyTree[Array],
        order: Any,
        done: int,
    ) -> None:
        """The one host round trip of a chunk."""
        if not self.raises or isinstance(records["loss"], jax.core.Tracer):
            jax.block_until_ready(records)
            return
        records = jax.device_get(records)
        if all(np.isfinite(x).all() for x in records.values()):
            return
        message = explain_failure(
            self.step_fn,
            before,
            lambda i: self.engine.batch(order, i),
            lambda i: order.indices(i, 1)[0],
            done,
            len(records["loss"]),
        )
        # The norm of a large but finite gradient may overflow: that is no failure.
        if message is not None:
            raise FloatingPointError(message)


def _show(bar: Any, count: int, records: PyTree[Array]) -> None:
    loss = records["loss"]
    if not bar.disable and not isinstance(loss, jax.core.Tracer):
        bar.set_postfix(loss=f"{float(loss[-1]):.3e}", refresh=False)
    bar.update(count)
