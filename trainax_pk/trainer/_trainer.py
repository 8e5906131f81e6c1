"""What is trained on what, and how."""

import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainax_pk._tree import check_count, check_flag
from trainax_pk.callback import AbstractCallback
from trainax_pk.checkpoint import Policy, Segment, Start
from trainax_pk.checkpoint._folder import check_path
from trainax_pk.checkpoint._identity import describe
from trainax_pk.checkpoint._run import Run
from trainax_pk.checkpoint._run_base import AbstractRun, NoRun
from trainax_pk.checkpoint._run_shared import SharedRun
from trainax_pk.configuration import AbstractConfiguration
from trainax_pk.configuration._base import window_steps
from trainax_pk.data import Samples, ShuffledOrder, Trajectories, as_items
from trainax_pk.engine import Engine, make_feed
from trainax_pk.engine._lift import holds_tracers
from trainax_pk.evaluation import EarlyStopping, Monitor
from trainax_pk.step import make_train_step
from trainax_pk.step._options import SKIP_GRADIENT, as_decays
from trainax_pk.tracker import AbstractTracker
from trainax_pk.trainer._checks import (
    check_call,
    check_callbacks,
    check_monitors,
    check_parts,
    check_policy,
    check_run,
    check_skips,
    check_trackers,
)
from trainax_pk.trainer._failure import DESCENT
from trainax_pk.trainer._history import History
from trainax_pk.trainer._loop import Loop, longest_gap
from trainax_pk.trainer._mesh import Devices, Rule
from trainax_pk.trainer._saved import identify


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
        ema_decay: float | Sequence[float] | None = None,
        nonfinite: str = "raise",
        max_skipped: int | None = None,
        window_stride: int = 1,
        residency: str = "auto",
        program: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
        parameters: str | Rule = "replicated",
        checkpoints: Policy | None = None,
        log_every: int = 100,
        trackers: Sequence[AbstractTracker] = (),
        early_stopping: EarlyStopping | str | None = None,
        monitors: Sequence[Monitor | str] = (),
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
                `history.state.ema_model`, the n-th of several
                `history.state.averaged_model(n)`.
            nonfinite: "raise" (FloatingPointError naming update and leaves), "skip" or
                "ignore".
            max_skipped: With "skip", the most updates in a row that may be left out
                before FloatingPointError; None for any number.
            window_stride: Distance between the first times of windows.
            residency: "device", "host", "disk" for a `CachedDataset` that is streamed,
                or "auto": host where the data do not fit on the device, disk where a
                `CachedDataset` exceeds its memory budget.
            program: "loop", "scan", or "auto": measured where no rule decides.
            mesh: Devices over which every batch is split, along all of its axes but one
                called "members", over which the members of an ensemble are; the rest is
                replicated. They may belong to several processes (docs/scale.md).
            parameters: "sharded" splits large arrays of parameters, optimizer state
                and average over these devices, too; or a rule `(path, array) ->
                PartitionSpec`.
            checkpoints: When a run with a `run_dir` is saved, and what is kept.
            log_every: Updates per line of its metric log.
            trackers: Where its metrics are shown, such as `tx.tracker.TensorBoard()`.
            early_stopping: When to end before `num_training_steps`, by what callbacks
                report; a name stands for `EarlyStopping(name)`.
            monitors: What else models are compared by: `history.best` tells where each
                was best, and a run keeps a checkpoint of it.
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
        accumulate = check_parts(self.batch_size, accumulate)
        self.ema = len(as_decays(ema_decay))
        self.callbacks = check_callbacks(callbacks, averages=self.ema)
        self.early_stopping, self.monitors = check_monitors(
            early_stopping, monitors, self.callbacks
        )
        self.trackers = check_trackers(trackers)
        self.checkpoints = check_policy(checkpoints)
        self._step_options = options = {
            "accumulate": accumulate,
            "max_grad_norm": max_grad_norm,
            "compute_dtype": compute_dtype,
            "ema_decay": ema_decay,
        }
        self.devices = Devices(mesh, self.batch_size, parameters)
        self.configuration = configuration
        self.optimizer = optimizer
        self.step_fn, self._fast_step = self._steps(nonfinite, options)
        self.trainable = trainable
        self.raises, self.watched = nonfinite == "raise", nonfinite != "ignore"
        self.max_skipped = check_skips(max_skipped, nonfinite)
        self._program = program
        self._parts = self._compared(nonfinite, options)
        self._data_fields: dict[str, str] | None = None
        self.windows = self._items(data, window_stride, residency)
        longest_gap(self)  # raises where a batch is too large for the memory budget
        self._lifts = holds_tracers(configuration, optimizer)
        self.engine = self._engine(program, self.num_training_steps)

    def _compared(self, nonfinite: str, options: dict[str, Any]) -> dict[str, Any]:
        """What a run is compared by, beside data, model and key."""
        return options | {
            "configuration": self.configuration,
            "optimizer": self.optimizer,
            "batch_size": self.batch_size,
            "nonfinite": nonfinite,
            "program": self._program,
        }

    def _items(self, data: Any, stride: int, residency: str) -> Any:
        """Windows or samples, of which a batch can be made."""
        configuration = self.configuration
        items = as_items(
            data,
            lambda trajectories: window_steps(configuration, trajectories.time),
            stride=stride,
            only_initial=configuration.num_times == 1,
            residency=residency,
        )
        # Raises before any compute when a batch is larger than the data.
        ShuffledOrder(len(items), self.batch_size, jax.random.key(0))
        return self.devices.replicate_items(items)

    def _steps(self, nonfinite: str, options: dict[str, Any]) -> tuple[Any, Any]:
        """The step, and what runs in its place where somebody looks after every chunk.

        Guarding every update costs a tenth to a quarter of a small one. Where the run
        ends at the first failure anyway, chunks run unguarded; where updates are skipped,
        what an optimizer makes of a finite gradient is looked at after a chunk.
        """

        def make(kind: str) -> Any:
            return self.devices.split_batches(
                make_train_step(
                    self.configuration, self.optimizer, nonfinite=kind, **options
                )
            )

        guarded = make(nonfinite)
        trusting = {"raise": "ignore", "skip": SKIP_GRADIENT}
        return guarded, make(trusting[nonfinite]) if nonfinite in trusting else guarded

    def _descend(self) -> Any:
        """The step by plain gradient descent, without clipping and averages."""
        options = self._step_options | {"max_grad_norm": None, "ema_decay": None}
        return self.devices.split_batches(
            make_train_step(self.configuration, DESCENT, nonfinite="ignore", **options)
        )

    def _engine(self, program: str, num_updates: int) -> Engine:
        return Engine(
            self._fast_step,
            make_feed(self.windows, self.num_training_steps, self.devices.share),
            num_updates=num_updates,
            program=program,
            raises=self.raises,
            guarded=self.step_fn,
            lifts=self._lifts,
            split=self.devices.members,
            settle=self.devices.settle,
            measures=self.devices.team.size == 1,
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
        start: Start | None = None,
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
            start: What to take over from another run before the first update.

        Returns:
            The trained model, and the history; stacked for an ensemble.

        Raises:
            FloatingPointError: A loss, a gradient or what the optimizer made of it was not
                finite; the message names the update, its windows and the leaves. Inside
                `jax.jit` nothing can be raised: there all updates from the first such
                one on are left out, and `history.state.num_skipped` counts them.
            ValueError: A model without trainable leaves, that cannot take the state or
                changes its shape or dtype; no key, or another number of keys than of
                models; `run_dir` for an ensemble, or where no folder can be; RunChanged
                where `run_dir` holds a run of something else; a callback whose results
                change their form.
            CheckpointDamaged: `run_dir` holds checkpoints, and none is valid.
            SaveFailed: The last state could not be saved; the exception has the model.
            OSError: `run_dir` cannot be written to.
            TimeoutError: Another process is at work in `run_dir`.
            KeyboardInterrupt: SIGINT, after saving; SIGTERM raises SystemExit(143).
        """
        check_call(model, key, ensemble=ensemble)
        allow_changes = check_run(run_dir, segment, allow_changes, start)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(key))
        single = self.early_stopping or self.monitors or self.max_skipped is not None
        self.devices.check_models(
            ensemble=ensemble or traced, number=key.shape[0] if ensemble else None
        )
        if (ensemble or traced) and single:
            raise ValueError(
                "Expected one model with `early_stopping`, `monitors` or `max_skipped`, "
                "got an ensemble. Train its members one by one; they would end at "
                "different times."
            )
        if start is not None and (ensemble or traced):
            raise ValueError(
                "Expected one model with `start`, got an ensemble. Load its members with "
                "tx.checkpoint.load_model, and stack them."
            )
        if run_dir is None:
            if not ensemble:
                return self._train(model, key, NoRun(), start)
            return eqx.filter_vmap(lambda m, k: self._train(m, k, NoRun()))(model, key)
        if ensemble or traced:
            raise ValueError(
                "Expected one model with `run_dir`, got an ensemble. Train its members "
                "one by one, each in a folder of its own."
            )
        run = self._run(model, key, run_dir, segment, allow_changes)
        return self._train(model, key, run, start)

    def _run(
        self,
        model: PyTree[Any],
        key: PRNGKeyArray,
        run_dir: str | os.PathLike[str],
        segment: Segment | None,
        allow_changes: Iterable[str],
    ) -> AbstractRun:
        if self._data_fields is None:
            self._data_fields = describe(self.windows, "data")
            # Before they have seen anything, which they may remember.
            self._callback_fields = describe(self.callbacks, "callbacks")
        may = {
            "num_training_steps": self.num_training_steps,
            "callbacks": [c.name for c in self.callbacks],
            "early_stopping": self.early_stopping,
            "monitors": self.monitors,
            "log_every": self.log_every,
            "max_skipped": self.max_skipped,
            "devices": self.devices.count,
        }
        run = Run(
            check_path("run_dir", run_dir),
            policy=self.checkpoints,
            identity=identify(self._parts, self._data_fields, model, key, may),
            num_steps=self.num_training_steps,
            steps_per_epoch=Fraction(len(self.windows), self.batch_size),
            log_every=self.log_every,
            segment=segment,
            allow_changes=allow_changes,
            trackers=self.trackers,
            saves_alone=self.devices.saves_alone,
            callbacks=self._callback_fields,
        )
        return SharedRun(self.devices.team, run) if self.devices.team.size > 1 else run

    def _train(
        self,
        model: PyTree[Any],
        key: PRNGKeyArray,
        run: AbstractRun,
        start: Start | None = None,
    ) -> tuple[PyTree[Any], History]:
        return Loop(self, model, key, run, start).train()

    def engine_of(self, program: str, num_updates: int) -> Engine:
        """The programs that a saved run was begun with: others differ in last bits.

        Args:
            program: Its family.
            num_updates: How many updates lay ahead when it began.
        """
        family = self._program if self._program != "auto" else program
        choice = self.engine.choice
        same = self._program == family or (choice and choice.family == family)
        if same and num_updates == self.num_training_steps:
            return self.engine
        return self._engine(family, num_updates)
