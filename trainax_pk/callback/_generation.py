"""Whole generations, scored on the way."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from trainax_pk._tree import check_average, check_count
from trainax_pk.callback._base import AbstractCallback, Context, check_callback
from trainax_pk.data import Samples
from trainax_pk.engine import make_rewrite
from trainax_pk.generation import AbstractSampler, as_fields, generate
from trainax_pk.generation._samplers import check_sampler
from trainax_pk.loss import crps_ensemble
from trainax_pk.metrics import spectral_ratio
from trainax_pk.step import TrainState
from trainax_pk.step._keys import stream_key


def crps(ensemble: Array, reference: Array) -> Float[Array, ""]:
    """Fair CRPS, the mean over samples."""
    return jnp.mean(jax.vmap(crps_ensemble)(ensemble, reference))


_METRICS = {"crps": crps, "spectral_ratio": spectral_ratio}


class Generation(AbstractCallback):
    """Metrics of ensembles that the full sampler draws for held-out conditions.

    The inference task of a generative model: `Validation` scores single noise levels,
    this what comes out at the end. The same noise at every evaluation, so that numbers of
    a run compare. Cost: `num_samples` draws for each sample of the data.

    Attributes:
        sampler: What draws.
        target: Held-out fields, `(N, C, *space)`.
        condition: What they are drawn from, or None.
        metrics: By name, `(ensemble, reference) -> array` of `(N, num_samples, C,
            *space)` and `(N, C, *space)`: `tx.metrics.spread_error_ratio`, say. Without
            any: "crps", the fair one, and "spectral_ratio" by wavenumber.
        every: Number of updates between records.
        num_samples: Draws per sample.
        batch_size: Samples that are drawn for at once; between two batches a run in a
            folder hears signals.
        use_ema: Draw from the moving average of the model; of several the one of this
            number, counted from 1.
        name: Key in `history.records`; its value is a dict by metric.

    Raises:
        ValueError: A count below 1, no sampler, no metrics by name, data that are no
            fields; when called, a model that the sampler is not for.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> held_out = G.Fields(jnp.ones((4, 1, 16)), jnp.ones((4, 1, 4)))
        >>> task = tx.callback.Generation(held_out, G.EDMSampler(), every=100)
        >>> task.name, sorted(task.metrics)
        ('generation', ['crps', 'spectral_ratio'])
    """

    sampler: AbstractSampler
    target: Array
    condition: PyTree[Array] | None
    metrics: dict[str, Callable[..., Any]]
    every: int = eqx.field(static=True)
    num_samples: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    use_ema: bool | int = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __init__(
        self,
        data: Any,
        sampler: AbstractSampler,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        *,
        every: int,
        num_samples: int = 8,
        batch_size: int = 16,
        use_ema: bool | int = False,
        name: str = "generation",
    ) -> None:
        """Checks and keeps.

        Args:
            data: `tx.generation.Fields`, a tuple (target, condition), targets, or
                `tx.data.Samples` of these.
            sampler: `EDMSampler` for a `Denoiser`, `FlowSampler` for a `Velocity`.
            metrics: By name, or None for the default ones.
            every: Number of updates between records.
            num_samples: Draws per sample.
            batch_size: Samples that are drawn for at once.
            use_ema: Which weights.
            name: Key of the records.
        """
        self.every = check_callback(every, name)
        self.sampler = check_sampler(sampler)
        self.num_samples = check_count("num_samples", num_samples)
        batch_size = check_count("batch_size", batch_size)
        metrics = _METRICS if metrics is None else metrics
        is_mapping = isinstance(metrics, Mapping) and metrics
        if not is_mapping or not all(map(callable, metrics.values())):
            raise ValueError(
                f"Expected `metrics` to be functions by name, got {metrics!r}. Leave it "
                "out for CRPS and spectra, or pass a dict such as {'ratio': "
                "tx.metrics.spread_error_ratio}."
            )
        self.metrics = dict(metrics)
        data = data.arrays if isinstance(data, Samples) else data
        target, condition = as_fields(data)
        self.target = jnp.asarray(target)
        self.condition = jax.tree.map(jnp.asarray, condition)
        self.batch_size = min(batch_size, len(self.target))
        self.use_ema = check_average(use_ema)
        self.name = name

    def __call__(self, context: Context) -> dict[str, PyTree[Array]]:
        """The metrics by name."""
        number, parts = len(self.target), []
        leaves = jax.tree.leaves(context.state)
        traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
        for start in range(0, number, self.batch_size):
            # All of one length, for one program: the last batch begins where it fits.
            first = np.int32(min(start, number - self.batch_size))
            parts.append(_draws(self, context.state, first))
            if context.poll is not None and not traced:
                jax.block_until_ready(parts[-1])
                context.poll()
        return _scores(self, parts)


@eqx.filter_jit
def _draws(callback: Generation, state: TrainState, first: Any) -> Array:
    """Ensembles of a batch of conditions."""
    number = int(callback.use_ema)
    model = state.averaged_model(number) if number else state.model
    arrays, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_array)
    space = callback.target.shape[2:]
    keys = jax.random.split(
        stream_key(state.key, "generate", jnp.int32(0)), len(callback.target)
    )
    keys, condition = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first, callback.batch_size),
        (keys, callback.condition),
    )

    def ensembles(arrays: PyTree, keys: Array, condition: PyTree) -> Array:
        model = eqx.combine(arrays, static)

        def one(key: Array, condition: PyTree) -> Array:
            return generate(
                model,
                callback.sampler,
                key,
                condition,
                num_samples=callback.num_samples,
                space=space,
            )

        return jax.vmap(one)(keys, condition)

    # Samplers are loops, and a CPU runs convolutions slowly inside of them.
    rewrite = make_rewrite(jax.default_backend(), 1)
    return rewrite(ensembles)(arrays, keys, condition)


@eqx.filter_jit
def _scores(callback: Generation, parts: list[Array]) -> dict[str, Any]:
    left = len(callback.target) - callback.batch_size * (len(parts) - 1)
    draws = jnp.concatenate([*parts[:-1], parts[-1][-left:]])
    return {name: f(draws, callback.target) for name, f in callback.metrics.items()}
