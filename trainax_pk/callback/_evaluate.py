"""Losses and metrics on data."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from trainax_pk._rollout import rollout
from trainax_pk._tree import as_int, check_count, check_flag
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
        use_ema: Evaluate the moving average of the model.
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
    use_ema: bool = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __init__(
        self,
        configuration: AbstractConfiguration,
        data: Trajectories | Samples | PyTree[Array],
        *,
        every: int,
        batch_size: int = 128,
        use_ema: bool = False,
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
        self.use_ema = check_flag("use_ema", use_ema)
        self.name = name

    def __call__(self, context: Context) -> Float[Array, ""]:
        """The mean loss."""
        return _mean_loss(self, context.state)


class RolloutMetrics(AbstractCallback):
    """Metrics of the model's rollout from the first state of held-out trajectories.

    Attributes:
        trajectories: References, leaves `(num_samples, num_times, ...)`.
        metrics: By name, `(prediction, reference) -> array`, both without the initial
            state, such as the functions of `tx.metrics`.
        every: Number of updates between records.
        use_ema: Roll out the moving average of the model.
        name: Key in `history.records`; its value is a dict by metric.

    Raises:
        ValueError: `every` below 1, no metrics by name, NaN in the data.

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
    use_ema: bool = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __init__(
        self,
        data: Trajectories | PyTree[Array],
        metrics: Mapping[str, Callable[..., Any]],
        *,
        every: int,
        use_ema: bool = False,
        name: str = "rollout",
    ) -> None:
        self.every = check_callback(every, name)
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
        self.metrics = dict(metrics)
        self.use_ema = check_flag("use_ema", use_ema)
        self.name = name

    def __call__(self, context: Context) -> dict[str, PyTree[Array]]:
        """The metrics by name."""
        return _rollout_metrics(self, context.state)


@eqx.filter_jit
def _loss(
    configuration: AbstractConfiguration, state: TrainState, batch: PyTree[Array]
) -> Float[Array, ""]:
    return make_eval_step(configuration)(state, batch)[0]


@eqx.filter_jit
def _mean_loss(callback: Validation, state: TrainState) -> Float[Array, ""]:
    evaluate = make_eval_step(callback.configuration, use_ema=callback.use_ema)
    windows, size = callback.windows, callback.batch_size
    count, rest = divmod(len(windows), size)

    def batch_loss(indices: Array) -> Array:
        return evaluate(state, windows.gather(windows.arrays, indices))[0]

    full = jnp.arange(count * size, dtype=jnp.int32).reshape(count, size)
    total = size * jnp.sum(jax.lax.map(batch_loss, full))
    if rest:
        tail = jnp.arange(count * size, len(windows), dtype=jnp.int32)
        total = total + rest * batch_loss(tail)
    return total / len(windows)


@eqx.filter_jit
def _rollout_metrics(callback: RolloutMetrics, state: TrainState) -> dict[str, Any]:
    model = state.ema_model if callback.use_ema else state.model
    model = eqx.nn.inference_mode(model)
    data = callback.trajectories
    num_steps = jax.tree.leaves(data.state)[0].shape[1] - 1
    num_samples = jax.tree.leaves(data.state)[0].shape[0]
    u0 = jax.tree.map(lambda x: x[:, 0], data.state)
    keys = jax.random.split(state.key, num_samples)
    prediction = jax.vmap(
        lambda u, s, t, k: rollout(model, u, num_steps, sample=s, time=t, key=k)
    )(u0, data.sample, data.time, keys)
    reference = jax.tree.map(lambda x: x[:, 1:], data.state)
    return {name: f(prediction, reference) for name, f in callback.metrics.items()}
