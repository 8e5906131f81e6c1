"""Data of inverse problems by name: observations with the truth, pairs of parameters."""

import abc
from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, PRNGKeyArray, PyTree

import trainax_pk.amortized as amortized
import trainax_pk.data as data
import trainax_pk.sample_data as sample_data
from trainax_pk._batch import Batch1D
from trainax_pk._rollout import rollout
from trainax_pk.experiment._data import AbstractSource, Count, NonZero
from trainax_pk.experiment._schedule import NonNegative, Positive
from trainax_pk.experiment._spec import AbstractSpec, Family, register

Range = tuple[float, float]


class AbstractSamples(AbstractSource):
    """Samples that are trained on whole, split by sample: `build()`."""

    def build(self) -> data.Split:
        """Training, validation and test samples."""
        make, cut = jax.random.split(jax.random.key(self.data_seed))
        arrays = self.samples(make)
        count = len(data.Samples(arrays))
        rows = np.asarray(jax.random.permutation(cut, count))
        bounds = np.rint(np.cumsum((0.0, *self.split)) * count).astype(int)
        if (np.diff(bounds) < 1).any():
            raise ValueError(
                f"Expected shares that leave no part empty, got {self.split} of {count} "
                "samples. Pass larger shares, or more samples."
            )
        parts = [rows[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        return data.Split(*(data.Samples(_take(arrays, p)) for p in parts))

    @abc.abstractmethod
    def samples(self, key: PRNGKeyArray) -> PyTree[Array]:
        """All samples, leaves `(num_samples, ...)`."""


def _take(arrays: PyTree[Array], rows: np.ndarray) -> PyTree[Array]:
    return jax.tree.map(lambda x: x[rows], arrays)


@register("data")
class Observations(AbstractSamples):
    """Windows of a system with gaps and noise, and the truth: `tx.Batch1D`.

    Every `every`-th time is observed with noise of standard deviation `noise_std`, in
    units of `scale`, which states are divided by.
    """

    gives: ClassVar[str] = "observations"
    kind: Literal["observations"] = "observations"
    system: Annotated[AbstractSpec, Family("data")]
    every: Count = 4
    noise_std: NonNegative = 0.1
    scale: Positive = 10.0

    @pydantic.model_validator(mode="after")
    def _vectors(self) -> "Observations":
        if self.system.gives != "states" or len(self.system.state_shape()) != 1:
            raise ValueError(
                "expected a system whose state is a vector, got "
                f"{self.system.kind}. Choose lorenz_63 or lorenz_96."
            )
        return self

    def state_shape(self) -> tuple[int, ...]:
        """`(num_variables,)`."""
        return self.system.state_shape()

    def samples(self, key: PRNGKeyArray) -> Batch1D:
        """All windows."""
        make, noise_key = jax.random.split(key)
        truth = jnp.asarray(self.system.trajectories(make)) / self.scale
        noise = self.noise_std * jax.random.normal(noise_key, truth.shape, truth.dtype)
        mask = jnp.zeros(truth.shape, bool).at[:, :: self.every].set(True)
        return Batch1D(jnp.where(mask, truth + noise, 0.0), mask, truth)


@register("data")
class Lorenz63Parameters(AbstractSamples):
    """Pairs of Lorenz's parameters (σ, ρ, β) and noisy trajectories of them.

    Parameters are uniform within `sigma`, `rho` and `beta`. A trajectory starts from
    (1, 1, 1), runs `num_warmup_steps` unseen, and is then read every `every` steps,
    `num_times` times, with noise.
    """

    gives: ClassVar[str] = "pairs"
    kind: Literal["lorenz_63_parameters"] = "lorenz_63_parameters"
    num_samples: Count = 1000
    num_times: Count = 20
    every: Count = 5
    dt: Positive = 0.01
    sigma: Range = (8.0, 12.0)
    rho: Range = (24.0, 32.0)
    beta: Range = (2.0, 3.5)
    noise_std: NonNegative = 0.5
    num_warmup_steps: NonZero = 50

    @pydantic.field_validator("sigma", "rho", "beta")
    @classmethod
    def _ascend(cls, bounds: Range) -> Range:
        if not bounds[0] < bounds[1]:
            raise ValueError(f"expected bounds that ascend, got {bounds}. Swap them.")
        return bounds

    def state_shape(self) -> tuple[int, ...]:
        """`(num_times, 3)`: that of an observation."""
        return (self.num_times, 3)

    def prior(self) -> data.BoxUniform:
        """Of the parameters."""
        return data.BoxUniform(*zip(self.sigma, self.rho, self.beta, strict=True))

    def samples(self, key: PRNGKeyArray) -> amortized.Pairs:
        """All pairs."""
        theta_key, noise_key = jax.random.split(key)
        prior = self.prior()
        theta = jax.vmap(prior.sample)(jax.random.split(theta_key, self.num_samples))
        x = jax.jit(jax.vmap(self._observed))(theta)
        noise = self.noise_std * jax.random.normal(noise_key, x.shape, x.dtype)
        return amortized.Pairs(theta, x + noise, prior=prior)

    def _observed(self, theta: Array) -> Array:
        stepper = eqx.tree_at(
            lambda s: (s.sigma, s.rho, s.beta),
            sample_data.make_lorenz_63_stepper(self.dt),
            tuple(theta),
        )
        steps = self.num_warmup_steps + self.num_times * self.every
        states = rollout(stepper, jnp.ones(3, theta.dtype), steps)
        return states[self.num_warmup_steps :: self.every]
