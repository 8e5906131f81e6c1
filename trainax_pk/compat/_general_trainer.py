"""trainax's trainer over the engine."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from tqdm.auto import tqdm

from trainax_pk.compat._mixer import EpochOrder, PermutationMixer
from trainax_pk.compat.callback import BaseCallback, CompositeCallback
from trainax_pk.compat.configuration import BaseConfiguration
from trainax_pk.configuration import AbstractConfiguration, Aux
from trainax_pk.engine import AbstractFeed, ChunkClock, Engine, chunk_size
from trainax_pk.step import TrainState, make_train_step


class GeneralTrainer(eqx.Module):
    """Trains a stepper on windows with a configuration; the call signature of trainax.

    The return type depends on the flags, as there: `stepper`, then the loss history
    unless `return_loss_history=False`, then the callback's results if there is one.

    Attributes:
        trajectory_sub_stacker: `indices -> windows`, with `num_total_samples`.
        loss_configuration: The configuration.
        ref_stepper: Reference that the configuration may need.
        residuum_fn: Residuum that it may need.
        optimizer: An optax transformation.
        num_minibatches: Number of updates.
        batch_size: Windows per update; the last batch of an epoch is the remainder.
        callback_fn: `(update_i, stepper, data) -> dict`, before every update.
    """

    trajectory_sub_stacker: Any
    loss_configuration: BaseConfiguration
    ref_stepper: Any
    residuum_fn: Any
    optimizer: optax.GradientTransformation
    num_minibatches: int
    batch_size: int
    callback_fn: Any

    def __init__(
        self,
        trajectory_sub_stacker: Any,
        loss_configuration: BaseConfiguration,
        *,
        ref_stepper: Any = None,
        residuum_fn: Any = None,
        optimizer: optax.GradientTransformation,
        num_minibatches: int,
        batch_size: int,
        callback_fn: Any = None,
    ) -> None:
        self.trajectory_sub_stacker = trajectory_sub_stacker
        self.loss_configuration = loss_configuration
        self.ref_stepper = ref_stepper
        self.residuum_fn = residuum_fn
        self.optimizer = optimizer
        self.num_minibatches = num_minibatches
        self.batch_size = batch_size
        self.callback_fn = callback_fn

    def full_loss(self, stepper: Any) -> Float[Array, ""]:
        """Loss on all windows at once."""
        return self._loss(stepper, self.trajectory_sub_stacker.data_sub_trajectories)

    def step_fn(
        self, stepper: Any, opt_state: Any, data: PyTree[Array]
    ) -> tuple[Any, Any, Float[Array, ""]]:
        """One update: `(stepper, opt_state, loss)`."""
        loss, grad = eqx.filter_value_and_grad(lambda m: self._loss(m, data))(stepper)
        updates, opt_state = self.optimizer.update(grad, opt_state, stepper)
        return eqx.apply_updates(stepper, updates), opt_state, loss

    def __call__(
        self,
        stepper: Any,
        key: PRNGKeyArray,
        opt_state: Any = None,
        *,
        return_loss_history: bool = True,
        record_loss_every: int = 1,
        spawn_tqdm: bool = True,
    ) -> Any:
        """Trains the stepper; see the class for what is returned."""
        mixer = PermutationMixer(
            self.trajectory_sub_stacker.num_total_samples,
            self.num_minibatches,
            self.batch_size,
            key,
        )
        state = TrainState.create(stepper, self.optimizer, key=jax.random.key(0))
        if opt_state is not None:
            state = eqx.tree_at(lambda s: s.opt_state, state, opt_state)
        run = _Run(self, mixer)
        with tqdm(
            total=self.num_minibatches,
            disable=not spawn_tqdm,
            desc=f"E: {0:05d}, B: {0:05d}",
        ) as bar:
            state, losses, aux = run(state, bar)
        results = [state.model]
        if return_loss_history:
            results.append(losses[::record_loss_every])
        if self.callback_fn is not None:
            results.append(aux)
        return tuple(results) if len(results) > 1 else results[0]

    def _loss(self, stepper: Any, data: PyTree[Array]) -> Float[Array, ""]:
        return self.loss_configuration(
            stepper, data, ref_stepper=self.ref_stepper, residuum_fn=self.residuum_fn
        )


class _Adapted(AbstractConfiguration):
    """A trainer's configuration in the form that train steps take."""

    trainer: GeneralTrainer

    @property
    def num_times(self) -> int:
        return 1

    def __call__(
        self, model: Any, batch: PyTree[Array], *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, Aux]:
        del key
        return self.trainer._loss(model, batch), Aux()


class _StackerFeed(AbstractFeed):
    """Batches from any `indices -> windows` that is a PyTree of arrays."""

    stacker: Any

    def load(self, order: Any, start: int, count: int, size: int) -> PyTree[Array]:
        del start, count, size
        return (eqx.filter(self.stacker, eqx.is_array), order)

    def plan(self, arrays: PyTree[Array], start: Array, size: int) -> Array:
        return arrays[1].indices(start, size)

    def pick(self, arrays: PyTree[Array], plan: PyTree[Array], i: Array) -> PyTree:
        indices = jax.lax.dynamic_index_in_dim(plan, i, keepdims=False)
        return self._windows(arrays, indices)

    def single(self, arrays: PyTree[Array], start: Array, i: Array) -> PyTree[Array]:
        return self._windows(arrays, arrays[1].indices(start + i, 1)[0])

    def _windows(self, arrays: PyTree[Array], indices: Array) -> PyTree[Array]:
        static = eqx.filter(self.stacker, eqx.is_array, inverse=True)
        return eqx.combine(arrays[0], static)(indices)


class _Run:
    """The updates of one call: chunks between callbacks and epochs' remainders."""

    def __init__(self, trainer: GeneralTrainer, mixer: PermutationMixer) -> None:
        self.callback = trainer.callback_fn
        self.total = trainer.num_minibatches
        self.per_epoch = mixer.num_minibatches_per_epoch
        self.rest = mixer.num_total_samples % mixer.batch_size
        self.full_order = EpochOrder(
            mixer.permutations, mixer.batch_size, mixer.batch_size, self.per_epoch
        )
        self.rest_order = EpochOrder(
            mixer.permutations, self.rest, mixer.batch_size, self.per_epoch
        )
        step = make_train_step(_Adapted(trainer), trainer.optimizer, nonfinite="ignore")
        self.engine = Engine(
            step, _StackerFeed(trainer.trajectory_sub_stacker), num_updates=self.total
        )
        self.clock = ChunkClock()
        every = _interval(self.callback)
        self.size = chunk_size(min(every, self.total), 4 * mixer.batch_size)

    def __call__(self, state: TrainState, bar: Any) -> tuple[TrainState, Array, list]:
        losses, aux, done = [], [], 0
        while done < self.total:
            is_rest = self.rest > 0 and (done + 1) % self.per_epoch == 0
            order = self.rest_order if is_rest else self.full_order
            count = 1 if is_rest else self._count(done)
            if self.callback is not None:
                aux.extend(self._call_back(state, order, done, count))
            self.clock.begin()
            size = 1 if is_rest else self.size
            state, records = self.engine.run(state, order, done, count, size)
            self.clock.end(count)
            losses.append(records["loss"])
            done += count
            bar.update(count)
            epoch, place = divmod(done - 1, self.per_epoch)
            bar.set_description(f"E: {epoch:05d}, B: {place:05d}", refresh=False)
        return state, jnp.concatenate(losses), aux

    def _count(self, done: int) -> int:
        """Updates up to the next callback, the epoch's remainder or the end."""
        count = min(self.total - done, self.clock.limit(self.size))
        if self.rest:
            count = min(count, self.per_epoch - 1 - done % self.per_epoch)
        due = (n for n in range(1, count) if _is_due(self.callback, done + n))
        return next(due, count)

    def _call_back(
        self, state: TrainState, order: EpochOrder, done: int, count: int
    ) -> list[dict[str, Any]]:
        """Results of `count` updates, of which at most the first one is due."""
        results = []
        first = done
        if _is_due(self.callback, done):
            batch = self.engine.batch(order, done)
            results.append(self.callback(done, state.model, batch))
            first += 1
        results += [_absent(self.callback, i) for i in range(first, done + count)]
        return results


def _intervals(callback: Any) -> list[int]:
    """Intervals of a callback's parts; 1 for a function that says nothing of it."""
    if callback is None:
        return []
    if type(callback) is CompositeCallback:
        return [n for part in callback.callbacks for n in _intervals(part)]
    known = isinstance(callback, BaseCallback)
    if known and type(callback).__call__ is BaseCallback.__call__:
        return [callback.every]
    return [1]


def _interval(callback: Any) -> int:
    return min(_intervals(callback), default=2**31)


def _is_due(callback: Any, i: int) -> bool:
    return any(i % n == 0 for n in _intervals(callback))


def _absent(callback: Any, i: int) -> dict[str, Any]:
    """What the callback answers at an update where nothing is due."""
    return callback(i, None, None)
