"""The training loop."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree
from tqdm.auto import tqdm

from trainax_pk._tree import check_count, check_flag
from trainax_pk.callback import AbstractCallback, Context
from trainax_pk.configuration import AbstractConfiguration
from trainax_pk.data import Samples, ShuffledOrder, Trajectories, as_items
from trainax_pk.engine import ChunkClock, Engine, chunk_size, make_feed
from trainax_pk.step import TrainState, make_train_step
from trainax_pk.trainer._failure import explain_failure
from trainax_pk.trainer._history import History, HistoryBuilder


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
        self.callbacks = _check_callbacks(callbacks)
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
        self.windows = as_items(
            data,
            lambda trajectories: _window_steps(configuration, trajectories),
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
        self, model: PyTree[Any], *, key: PRNGKeyArray, ensemble: bool = False
    ) -> tuple[PyTree[Any], History]:
        """Trains a model.

        Args:
            model: Where to start; with `ensemble`, models stacked along a leading axis
                of their arrays, as `eqx.filter_vmap` makes them.
            key: Key of order and noise; with `ensemble`, one for each member.
            ensemble: Train a stack of models.

        Returns:
            The trained model, and the history; stacked for an ensemble.

        Raises:
            FloatingPointError: A loss or gradient was not finite; the message names the
                update, its windows and the leaves.
            ValueError: A model without trainable leaves, or that changes the state's
                shape or dtype.
        """
        if not ensemble:
            return self._train(model, key)
        return eqx.filter_vmap(self._train)(model, key)

    def _train(
        self, model: PyTree[Any], key: PRNGKeyArray
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
        total = self.num_training_steps
        size = chunk_size(self._longest_gap(), self._batch_bytes())
        with tqdm(total=total, disable=not self.progress, mininterval=0.2) as bar:
            done = 0
            while done < total:
                self._call_back(history, done, state, order)
                count = min(self._gap(done), clock.limit(size))
                clock.begin()
                before = state
                state, records = self.engine.run(state, order, done, count, size)
                self._check(before, records, order, done)
                clock.end(count)
                history.add_chunk(records)
                done += count
                _show(bar, count, records)
            self._call_back(history, done, state, order)
        choice = self.engine.describe()
        return state.model, history.build(state, choice)

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
        self, history: HistoryBuilder, done: int, state: TrainState, order: Any
    ) -> None:
        last = done == self.num_training_steps
        context = Context(done, state, lambda: self.engine.batch(order, done))
        for callback in self.callbacks:
            if last or done % callback.every == 0:
                history.add_record(callback.name, done, callback(context))

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


def _window_steps(
    configuration: AbstractConfiguration, trajectories: Trajectories
) -> int:
    """Steps of a window: those with targets, and all of them where there is forcing."""
    steps = configuration.num_times - 1
    if not jax.tree.leaves(trajectories.time):
        return steps
    return max(steps, _rollout_steps(configuration))


def _rollout_steps(configuration: Any) -> int:
    own = getattr(configuration, "num_rollout_steps", 0)
    members = getattr(configuration, "configurations", ())
    wrapped = getattr(configuration, "configuration", None)
    pushed = getattr(configuration, "num_steps", 0)
    inner = [_rollout_steps(c) for c in (*members, wrapped) if c is not None]
    return max([own, *(pushed + steps for steps in inner)])


def _check_callbacks(
    callbacks: Sequence[AbstractCallback],
) -> tuple[AbstractCallback, ...]:
    callbacks = tuple(callbacks)
    for callback in callbacks:
        if not isinstance(callback, AbstractCallback):
            raise ValueError(
                f"Expected callbacks, got {callback!r}. Wrap a function in "
                "tx.callback.Function(function, every, name)."
            )
    names = [c.name for c in callbacks]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(
            f"Expected callbacks with different names, got {repeated} more than once. "
            "Pass `name=`."
        )
    return callbacks


def _show(bar: Any, count: int, records: PyTree[Array]) -> None:
    loss = records["loss"]
    if not bar.disable and not isinstance(loss, jax.core.Tracer):
        bar.set_postfix(loss=f"{float(loss[-1]):.3e}", refresh=False)
    bar.update(count)
