"""Losses and metrics on data."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from trainax_pk._rollout import rollout
from trainax_pk._tree import as_int, check_average, check_count
from trainax_pk.callback._base import AbstractCallback, Context, check_callback
from trainax_pk.configuration import AbstractConfiguration
from trainax_pk.configuration._base import check_configuration, window_steps
from trainax_pk.data import (
    Samples,
    Trajectories,
    Windows,
    as_items,
    as_trajectories,
)
from trainax_pk.step import TrainState, make_eval_step

# Batches that are evaluated without looking up, and how long is looked away beyond them.
_AT_ONCE = 8
_PIECE_SECONDS = 1.0


class Loss(AbstractCallback):
    """Loss of another configuration on the batch of the next update.

    Attributes:
        configuration: Whose loss.
        every: Number of updates between records.
        name: Key in `history.records`.

    Raises:
        ValueError: `every` below 1, an empty name, no configuration.

    Example:
        >>> import trainax_pk as tx
        >>> tx.callback.Loss(tx.configuration.Supervised(5), every=10).name
        'loss'
    """

    configuration: AbstractConfiguration
    every: int = eqx.field(static=True, converter=as_int)
    name: str = eqx.field(static=True, default="loss")

    def __check_init__(self) -> None:
        check_callback(self.every, self.name)
        check_configuration(self.configuration)

    def __call__(self, context: Context) -> Float[Array, ""]:
        """The loss."""
        return _loss(self.configuration, context.state, context.batch)


class Validation(AbstractCallback):
    """Mean loss of a configuration over all windows of held-out trajectories.

    Windows are read batch by batch; the mean is over windows, so that it does not
    depend on the batch size. Layers run in inference mode.

    Attributes:
        configuration: What is evaluated.
        windows: Windows of the held-out trajectories, or held-out samples.
        every: Number of updates between records.
        batch_size: Windows that are evaluated at once.
        use_ema: Evaluate the moving average of the model; of several the one of this
            number, counted from 1.
        name: Key in `history.records`.

    Raises:
        ValueError: A count below 1, no configuration, trajectories shorter than it
            needs, NaN in the data.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> held_out = jnp.ones((2, 6, 1, 30))
        >>> one = tx.configuration.Supervised()
        >>> tx.callback.Validation(one, held_out, every=100).name
        'validation'
    """

    configuration: AbstractConfiguration
    windows: Windows | Samples
    every: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    use_ema: bool | int = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __init__(
        self,
        configuration: AbstractConfiguration,
        data: Trajectories | Samples | PyTree[Array],
        *,
        every: int,
        batch_size: int = 128,
        use_ema: bool | int = False,
        name: str = "validation",
    ) -> None:
        self.every = check_callback(every, name)
        check_configuration(configuration)
        batch_size = check_count("batch_size", batch_size)
        self.configuration = configuration
        self.windows = as_items(
            data,
            lambda trajectories: window_steps(configuration, trajectories.time),
            only_initial=configuration.num_times == 1,
        )
        if self.windows.residency == "disk":
            raise ValueError(
                "Expected held-out data that fit into memory, got a dataset beyond its "
                "memory budget. Pass the trajectories of fewer samples."
            )
        self.batch_size = min(batch_size, len(self.windows))
        self.use_ema = check_average(use_ema)
        self.name = name

    def __call__(self, context: Context) -> Float[Array, ""]:
        """The mean loss."""
        long = len(self.windows) > _AT_ONCE * self.batch_size
        if context.poll is None or _is_traced(context.state) or not long:
            return _mean_loss(self, context.state)
        return _polled_mean_loss(self, context.state, context.poll)


class RolloutMetrics(AbstractCallback):
    """Metrics of the model's rollout from the first state of held-out trajectories.

    Attributes:
        trajectories: References, leaves `(num_samples, num_times, ...)`.
        metrics: By name, `(prediction, reference) -> array`, both of all trajectories and
            without the initial state, such as the functions of `tx.metrics`.
        every: Number of updates between records.
        batch_size: Trajectories that are rolled out at once; between two batches a run in
            a folder hears signals.
        use_ema: Roll out the moving average of the model; of several the one of this
            number, counted from 1.
        name: Key in `history.records`; its value is a dict by metric.

    Raises:
        ValueError: A count below 1, no metrics by name, NaN in the data.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> nrmse = {"nrmse": tx.metrics.nrmse_per_lead_time}
        >>> held_out = jnp.ones((2, 6, 1, 30))
        >>> tx.callback.RolloutMetrics(held_out, nrmse, every=100).name
        'rollout'
    """

    trajectories: Trajectories
    metrics: dict[str, Callable[..., Any]]
    every: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    use_ema: bool | int = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __init__(
        self,
        data: Trajectories | PyTree[Array],
        metrics: Mapping[str, Callable[..., Any]],
        *,
        every: int,
        batch_size: int = 128,
        use_ema: bool | int = False,
        name: str = "rollout",
    ) -> None:
        self.every = check_callback(every, name)
        batch_size = check_count("batch_size", batch_size)
        if not metrics:
            raise ValueError(
                "Expected at least one metric, got none. Pass a dict such as "
                "{'nrmse': tx.metrics.nrmse_per_lead_time}."
            )
        if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
            raise ValueError(
                f"Expected `metrics` to be functions by name, got {metrics!r}. Pass a "
                "dict such as {'nrmse': tx.metrics.nrmse_per_lead_time}."
            )
        self.trajectories = as_trajectories(data)
        self.batch_size = min(batch_size, _num_samples(self.trajectories))
        self.metrics = dict(metrics)
        self.use_ema = check_average(use_ema)
        self.name = name

    def __call__(self, context: Context) -> dict[str, PyTree[Array]]:
        """The metrics by name."""
        number, parts = _num_samples(self.trajectories), []
        hears = context.poll is not None and not _is_traced(context.state)
        for start in range(0, number, self.batch_size):
            # All of one length, for one program: the last batch begins where it fits.
            first = np.int32(min(start, number - self.batch_size))
            parts.append(_rollouts(self, context.state, first))
            if hears and start + self.batch_size < number:
                jax.block_until_ready(parts[-1])
                context.poll()
        return _rollout_metrics(self, parts)


@eqx.filter_jit
def _loss(
    configuration: AbstractConfiguration, state: TrainState, batch: PyTree[Array]
) -> Float[Array, ""]:
    return make_eval_step(configuration)(state, batch)[0]


def _batch_loss(
    callback: Validation, state: TrainState, start: Any, size: int
) -> Array:
    """Loss of the windows from `start` on."""
    evaluate = make_eval_step(callback.configuration, use_ema=callback.use_ema)
    indices = start + jnp.arange(size, dtype=jnp.int32)
    windows = callback.windows
    return evaluate(state, windows.gather(windows.arrays, indices))[0]


@eqx.filter_jit
def _mean_loss(callback: Validation, state: TrainState) -> Float[Array, ""]:
    size, count = callback.batch_size, len(callback.windows) // callback.batch_size
    starts = size * jnp.arange(count, dtype=jnp.int32)
    losses = jax.lax.map(lambda i: _batch_loss(callback, state, i, size), starts)
    return _mean(callback, state, losses)


def _mean(callback: Validation, state: TrainState, losses: Array) -> Float[Array, ""]:
    """The mean over windows of the losses of whole batches, and of what is left."""
    size, number = callback.batch_size, len(callback.windows)
    total = size * jnp.sum(losses)
    if number % size:
        start = jnp.int32(number - number % size)
        rest = number % size
        total = total + rest * _batch_loss(callback, state, start, rest)
    return total / number


def _polled_mean_loss(
    callback: Validation, state: TrainState, poll: Callable[[], None]
) -> Float[Array, ""]:
    """As `_mean_loss`, in pieces between which signals are heard."""
    count = len(callback.windows) // callback.batch_size
    losses = _no_losses(callback, state)
    done, length = 0, 1
    while done < count:
        began = time.perf_counter()
        end = min(done + length, count)
        losses = _add_losses(callback, state, losses, np.int32(done), np.int32(end))
        jax.block_until_ready(losses)
        poll()
        # Four times as many at most: the first piece compiles, and a short one says little.
        pace = _PIECE_SECONDS / max(time.perf_counter() - began, 1e-9)
        done, length = end, max(1, int(length * min(pace, 4.0)))
    return _jitted_mean(callback, state, losses)


@eqx.filter_jit
def _no_losses(callback: Validation, state: TrainState) -> Array:
    size, count = callback.batch_size, len(callback.windows) // callback.batch_size
    like = jax.eval_shape(lambda: _batch_loss(callback, state, jnp.int32(0), size))
    return jnp.zeros(count, like.dtype)


@eqx.filter_jit
def _add_losses(
    callback: Validation, state: TrainState, losses: Array, start: Array, end: Array
) -> Array:
    size = callback.batch_size

    def body(i: Array, losses: Array) -> Array:
        return losses.at[i].set(_batch_loss(callback, state, i * size, size))

    return jax.lax.fori_loop(start, end, body, losses)


_jitted_mean = eqx.filter_jit(_mean)


@eqx.filter_jit
def _rollouts(
    callback: RolloutMetrics, state: TrainState, first: Any
) -> PyTree[Float[Array, "batch time ..."]]:
    """What the model makes of a batch of initial states."""
    number = int(callback.use_ema)
    model = state.averaged_model(number) if number else state.model
    model = eqx.nn.inference_mode(model)
    data, size = callback.trajectories, callback.batch_size
    num_steps = jax.tree.leaves(data.state)[0].shape[1] - 1

    def batch(tree: PyTree[Array]) -> PyTree[Array]:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), tree
        )

    keys = batch(jax.random.split(state.key, _num_samples(data)))
    u0 = jax.tree.map(lambda x: x[:, 0], batch(data.state))
    return jax.vmap(
        lambda u, s, t, k: rollout(model, u, num_steps, sample=s, time=t, key=k)
    )(u0, batch(data.sample), batch(data.time), keys)


@eqx.filter_jit
def _rollout_metrics(
    callback: RolloutMetrics, parts: list[PyTree[Array]]
) -> dict[str, Any]:
    left = _num_samples(callback.trajectories) - callback.batch_size * (len(parts) - 1)
    last = jax.tree.map(lambda x: x[-left:], parts[-1])
    prediction = jax.tree.map(lambda *x: jnp.concatenate(x), *parts[:-1], last)
    reference = jax.tree.map(lambda x: x[:, 1:], callback.trajectories.state)
    return {name: f(prediction, reference) for name, f in callback.metrics.items()}


def _is_traced(tree: PyTree[Any]) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _num_samples(data: Trajectories) -> int:
    return jax.tree.leaves(data.state)[0].shape[0]
