"""From noise to fields: equations that a trained model is the right-hand side of."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._tree import as_number, check_count
from trainax_pk.generation._models import check_positive, is_number, network_dtype

Field = Callable[[Array, Array], Array]


class AbstractSampler(eqx.Module):
    """Draws one field: `sampler(model, key, condition, space=...)`, pure.

    To add one: a final class that checks its numbers when it is built, names in `method`
    what a model has to have, and implements `carry`: standardised noise to a standardised
    field, with `jax.lax.scan` over steps whose number is fixed. Add a row to `SAMPLERS`
    in `tests/test_generation.py`.
    """

    method: eqx.AbstractClassVar[str]

    @abc.abstractmethod
    def carry(
        self,
        model: Any,
        key: PRNGKeyArray,
        noise: Float[Array, "C *space"],
        inputs: Float[Array, "K *space"],
    ) -> Float[Array, "C *space"]:
        """The standardised field that standard normal noise becomes.

        Args:
            model: With the method.
            key: For noise that is added on the way.
            noise: Where it begins.
            inputs: The condition as the network sees it.
        """

    def __call__(
        self,
        model: Any,
        key: PRNGKeyArray,
        condition: PyTree[Array] | None = None,
        *,
        space: tuple[int, ...] | None = None,
    ) -> Float[Array, "C *space"]:
        """One draw, in the units of the data.

        Args:
            model: What was trained.
            key: Key; the same gives the same field.
            condition: Of one sample, leaves `(C_i, *space_i)`, or None.
            space: Points along each axis; None for the finest grid of the condition.

        Raises:
            ValueError: A model that this sampler is not for, shapes it does not take.
        """
        if not callable(getattr(model, self.method, None)):
            raise ValueError(
                f"Expected a model with `{self.method}` for {type(self).__name__}, got "
                f"{type(model).__name__}. Pass a Denoiser to EDMSampler, a Velocity to "
                "FlowSampler."
            )
        scales = model.scales
        inputs = scales.inputs(condition, scales.space_of(condition, space))
        inputs = inputs.astype(network_dtype(model, inputs))
        start_key, key = jax.random.split(key)
        shape = (scales.num_channels, *inputs.shape[1:])
        noise = jax.random.normal(start_key, shape, inputs.dtype)
        return scales.physical(self.carry(model, key, noise, inputs), condition)


def _as_range(ends: Any) -> Any:
    return tuple(map(as_number, ends)) if isinstance(ends, tuple) else ends


class EDMSampler(AbstractSampler):
    """Heun's method for dz/dσ = (z − D(z; σ)) / σ from σ_max down to 0.

    σ_i = (σ_max^{1/ρ} + i/(N−1) (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ for i < N, and σ_N = 0; the
    last step is Euler's, which returns D(z; σ_min). With churn, noise is added before a
    step whose σ_i lies within `churn_range`: σ̂ = (1 + γ) σ_i, γ = min(churn / N, √2 − 1).
    σ counts in standard deviations of the (standardised) data. 2 N − 1 passes of the
    network, memory of one.

    Attributes:
        num_steps: N.
        sigma_min: Last noise level before 0.
        sigma_max: First one; beside it the data must not show.
        rho: ρ; larger ones place more steps at low noise.
        churn: S_churn >= 0; 0 for the deterministic equation.
        churn_range: (S_min, S_max) of σ.
        churn_noise: S_noise, standard deviation of the added noise, > 0.

    Raises:
        ValueError: When built: fewer than 1 step, not 0 < sigma_min < sigma_max, ρ not
            above 0, a negative churn, a range that does not ascend. When called: a model
            without `denoise`, shapes it does not take.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 2 and equation 5.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> model = G.Denoiser(net, G.FieldScales(1, 1, num_axes=1))
        >>> sampler = G.EDMSampler(num_steps=3)
        >>> sampler(model, jax.random.key(1), jnp.ones((1, 8))).shape
        (1, 8)
        >>> [round(float(s), 3) for s in sampler.sigmas]
        [80.0, 2.515, 0.002, 0.0]
    """

    method = "denoise"
    num_steps: int = eqx.field(static=True, default=18)
    sigma_min: float = eqx.field(static=True, default=0.002, converter=as_number)
    sigma_max: float = eqx.field(static=True, default=80.0, converter=as_number)
    rho: float = eqx.field(static=True, default=7.0, converter=as_number)
    churn: float = eqx.field(static=True, default=0.0, converter=as_number)
    churn_range: tuple[float, float] = eqx.field(
        static=True, default=(0.0, math.inf), converter=_as_range
    )
    churn_noise: float = eqx.field(static=True, default=1.0, converter=as_number)

    def __check_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        levels = (self.sigma_min, self.sigma_max)
        are_numbers = all(map(is_number, levels))
        if not are_numbers or not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "Expected 0 < `sigma_min` < `sigma_max`, got "
                f"{self.sigma_min!r} and {self.sigma_max!r}. They count in standard "
                "deviations of the data: leave them out for 0.002 and 80."
            )
        check_positive("rho", self.rho, "Karras et al. take 7.")
        check_positive("churn_noise", self.churn_noise, "1 keeps the noise level.")
        ends = self.churn_range
        # A list would be no static field: it cannot be hashed.
        is_pair = isinstance(ends, tuple) and len(ends) == 2
        if not (is_pair and all(map(is_number, (*ends, self.churn)))):
            raise ValueError(
                "Expected `churn` to be a number and `churn_range` a tuple of two, got "
                f"{self.churn!r} and {ends!r}. Pass for example churn_range=(0.05, 50.0)."
            )
        if not 0 <= self.churn < math.inf or not 0 <= ends[0] <= ends[1]:
            raise ValueError(
                f"Expected `churn` >= 0 and a `churn_range` that ascends from 0 or more, "
                f"got {self.churn} and {self.churn_range}. 0 adds no noise on the way."
            )

    @property
    def sigmas(self) -> np.ndarray:
        """σ_0 … σ_N, `(N + 1,)`."""
        root = 1 / self.rho
        ends = self.sigma_max**root, self.sigma_min**root
        share = np.arange(self.num_steps) / max(self.num_steps - 1, 1)
        return np.append((ends[0] + share * (ends[1] - ends[0])) ** self.rho, 0.0)

    def carry(
        self,
        model: Any,
        key: PRNGKeyArray,
        noise: Float[Array, "C *space"],
        inputs: Float[Array, "K *space"],
    ) -> Float[Array, "C *space"]:
        """The standardised field that standard normal noise becomes."""
        sigmas, dtype = self.sigmas, noise.dtype
        low, high = self.churn_range
        gamma = min(self.churn / self.num_steps, math.sqrt(2) - 1)
        churned = np.where((sigmas[:-1] >= low) & (sigmas[:-1] <= high), gamma, 0.0)
        raised = sigmas[:-1] * (1 + churned)
        added = self.churn_noise * np.sqrt(raised**2 - sigmas[:-1] ** 2)

        def slope(sigma: Array, z: Array) -> Array:
            return (z - model.denoise(z, sigma, inputs)) / sigma

        def stir(z: Array, std: Array, step: Array) -> Array:
            if not churned.any():
                return z
            step_key = jax.random.fold_in(key, step)
            return z + std * jax.random.normal(step_key, z.shape, dtype)

        def body(z: Array, x: tuple[Array, ...]) -> tuple[Array, None]:
            step, std, begin, end = x
            return heun_step(slope, stir(z, std, step), begin, end), None

        numbers = (added[:-1], raised[:-1], sigmas[1:-1])
        xs = (np.arange(self.num_steps - 1), *(jnp.asarray(n, dtype) for n in numbers))
        z, _ = jax.lax.scan(body, jnp.asarray(sigmas[0], dtype) * noise, xs)
        last = self.num_steps - 1
        z = stir(z, jnp.asarray(added[last], dtype), jnp.asarray(last))
        return model.denoise(z, jnp.asarray(raised[last], dtype), inputs)


class FlowSampler(AbstractSampler):
    """Heun's method for dz/dt = v(t, z) from t = 0 to 1, in equal steps.

    Second order; 2 N passes of the network, memory of one.

    Attributes:
        num_steps: N.

    Raises:
        ValueError: When built: fewer than 1 step. When called: a model without
            `velocity`, shapes it does not take.

    Source: Lipman et al. 2023, arXiv:2210.02747.

    Example:
        >>> import jax
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> model = G.Velocity(net, G.FieldScales(1, num_axes=1))
        >>> G.FlowSampler(4)(model, jax.random.key(1), space=(8,)).shape
        (1, 8)
    """

    method = "velocity"
    num_steps: int = eqx.field(static=True, default=16)

    def __check_init__(self) -> None:
        check_count("num_steps", self.num_steps)

    def carry(
        self,
        model: Any,
        key: PRNGKeyArray,
        noise: Float[Array, "C *space"],
        inputs: Float[Array, "K *space"],
    ) -> Float[Array, "C *space"]:
        """The standardised field that standard normal noise becomes."""
        del key

        def body(z: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
            slope = lambda t, z: model.velocity(t, z, inputs)  # noqa: E731
            return heun_step(slope, z, *ends), None

        times = jnp.linspace(0.0, 1.0, self.num_steps + 1, dtype=noise.dtype)
        return jax.lax.scan(body, noise, (times[:-1], times[1:]))[0]


class Generator(eqx.Module):
    """A model with its sampler as a function of a state: a probabilistic stepper.

    `tx.Stepper(generator, stochastic=True)` stands wherever a stepper may: trained with
    `next_step=True`, it is an emulator that draws the next state given the present one.

    Attributes:
        model: What was trained.
        sampler: What draws.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> model = G.Denoiser(net, G.FieldScales(1, 1, num_axes=1, residual=True))
        >>> generator = G.Generator(model, G.EDMSampler(num_steps=2))
        >>> stepper = tx.Stepper(generator, stochastic=True)
        >>> tx.rollout(stepper, jnp.ones((1, 8)), 3, key=jax.random.key(1)).shape
        (3, 1, 8)
    """

    model: Any
    sampler: AbstractSampler

    def __call__(
        self, condition: PyTree[Array], *, key: PRNGKeyArray
    ) -> Float[Array, "C *space"]:
        """One draw given a condition."""
        return self.sampler(self.model, key, condition)


def heun_step(slope: Field, z: Array, begin: Array, end: Array) -> Array:
    """z + h (k₁ + k₂) / 2 with k₁ = f(begin, z), k₂ = f(end, z + h k₁)."""
    h = end - begin
    first = slope(begin, z)
    second = slope(end, z + h * first)
    return z + 0.5 * h * (first + second)


def generate(
    model: Any,
    sampler: AbstractSampler,
    key: PRNGKeyArray,
    condition: PyTree[Array] | None = None,
    *,
    num_samples: int,
    space: tuple[int, ...] | None = None,
) -> Float[Array, "n C *space"]:
    """Independent draws given one condition: an ensemble.

    Pure; vmap it over keys and conditions. Inside of loops a CPU runs convolutions
    slowly: there compile `tx.engine.fast_convolutions(f)` instead of `f`.

    Args:
        model: What was trained.
        sampler: What draws; `EDMSampler` for a `Denoiser`, `FlowSampler` for a
            `Velocity`.
        key: Key.
        condition: Of one sample, leaves `(C_i, *space_i)`, or None.
        num_samples: n.
        space: Points along each axis; None for the finest grid of the condition.

    Returns:
        `(n, C, *space)`.

    Raises:
        ValueError: A count below 1, no sampler, and as the sampler.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> model = G.Denoiser(net, G.FieldScales(1, 1, num_axes=1))
        >>> G.generate(
        ...     model, G.EDMSampler(2), jax.random.key(1), jnp.ones((1, 8)), num_samples=5
        ... ).shape
        (5, 1, 8)
    """
    num_samples = check_count("num_samples", num_samples)
    check_sampler(sampler)
    keys = jax.random.split(key, num_samples)
    return jax.vmap(lambda k: sampler(model, k, condition, space=space))(keys)


def check_sampler(sampler: Any) -> AbstractSampler:
    """A sampler, or a ValueError."""
    if not isinstance(sampler, AbstractSampler):
        raise ValueError(
            f"Expected a sampler, got {sampler!r}. Pass for example "
            "tx.generation.EDMSampler(num_steps=18)."
        )
    return sampler
