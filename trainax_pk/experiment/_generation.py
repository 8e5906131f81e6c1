"""Models that generate fields, by name: data, networks, losses, samplers, a callback."""

import math
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import pydantic
from jaxtyping import PRNGKeyArray
from pydantic import Field

import trainax_pk.callback as callbacks
import trainax_pk.configuration as configurations
import trainax_pk.data as data
import trainax_pk.generation as generation
import trainax_pk.loss as losses
from trainax_pk.experiment._callback import AbstractCallbackSpec
from trainax_pk.experiment._configuration import AbstractConfiguration, Clocks
from trainax_pk.experiment._data import AbstractSource, Count
from trainax_pk.experiment._model import AbstractModel
from trainax_pk.experiment._schedule import NonNegative, Positive
from trainax_pk.experiment._spec import AbstractSpec, Family, register


@register("data")
class Downscaling(AbstractSource):
    """Fields of a system on a periodic grid, and their means over blocks.

    Every `every`-th time of each trajectory, at every `subsample`-th point along each axis,
    is a field; what is known of it are the means over blocks of `factor` points a side.
    Split by trajectory.
    """

    gives: ClassVar[str] = "fields"
    kind: Literal["downscaling"] = "downscaling"
    system: Annotated[AbstractSpec, Family("data")]
    factor: Annotated[int, Field(ge=2)] = 4
    subsample: Count = 1
    every: Count = 1

    @pydantic.model_validator(mode="after")
    def _grids(self) -> "Downscaling":
        whole = self.system.gives == "states" and self.system.state_shape()[1:]
        if not whole:
            raise ValueError(
                "expected a system whose state is a field, got "
                f"{self.system.kind}. Choose for example kolmogorov_flow_2d."
            )
        block = self.factor * self.subsample
        if any(n % block for n in whole):
            raise ValueError(
                f"expected grids of multiples of factor * subsample = {block} points, "
                f"got {list(whole)}. Change one of them."
            )
        return self

    def state_shape(self) -> tuple[int, ...]:
        """`(channels, *space)` of a fine field."""
        channels, *space = self.system.state_shape()
        return (channels, *(n // self.subsample for n in space))

    def build(self) -> data.Split:
        """Training, validation and test fields."""
        make, cut = jax.random.split(jax.random.key(self.data_seed))
        whole = self.system.trajectories(make)
        parts = data.split_by_trajectory(whole, self.split, key=cut)
        return data.Split(*(data.Samples(self._fields(p.state)) for p in parts))

    def _fields(self, states: jax.Array) -> generation.Fields:
        space = (slice(None, None, self.subsample),) * (states.ndim - 3)
        fine = jnp.asarray(states[:, :: self.every])[:, :, :, *space]
        fine = fine.reshape(-1, *fine.shape[2:])
        coarsen = jax.jit(jax.vmap(lambda u: generation.coarsen(u, self.factor)))
        return generation.Fields(fine, coarsen(fine))


class AbstractFieldModel(AbstractModel):
    """A model of fields around a `tx.generation.UNet`.

    Conditions have as many channels as the field. With `residual` what is generated is
    the difference from the interpolated condition.
    """

    needs: ClassVar[str] = "fields"
    is_stepper: ClassVar[bool] = False
    hidden_channels: Count = 16
    num_levels: Count = 3
    periodic: bool = True
    residual: bool = True

    def parts(
        self, shape: tuple[int, ...], key: PRNGKeyArray, num_fields: int
    ) -> tuple[Any, Any]:
        """Network, of `num_fields` times as many channels as the field, and scales."""
        channels, num_axes = shape[0], len(shape) - 1
        network = generation.UNet(
            num_fields * channels,
            channels,
            num_axes=num_axes,
            hidden_channels=self.hidden_channels,
            num_levels=self.num_levels,
            periodic=self.periodic,
            key=key,
        )
        scales = generation.FieldScales(
            channels,
            channels,
            num_axes=num_axes,
            residual=self.residual,
            periodic=self.periodic,
        )
        return network, scales

    def fitted(self, model: Any, train: Any) -> Any:
        """The model with scales of the training data."""
        return model.standardised(_as_fields(train))


@register("model")
class Denoiser(AbstractFieldModel):
    """`tx.generation.Denoiser`."""

    kind: Literal["denoiser"] = "denoiser"
    sigma_data: Positive = 1.0

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The model, with scales of 1 until `fitted` learns them."""
        return generation.Denoiser(*self.parts(shape, key, 2), self.sigma_data)


@register("model")
class Velocity(AbstractFieldModel):
    """`tx.generation.Velocity`."""

    kind: Literal["velocity"] = "velocity"

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The model, with scales of 1 until `fitted` learns them."""
        return generation.Velocity(*self.parts(shape, key, 2))


@register("model")
class SingleField(AbstractFieldModel):
    """`tx.generation.Regression`."""

    is_stepper: ClassVar[bool] = True
    kind: Literal["single_field"] = "single_field"

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The model, with scales of 1 until `fitted` learns them."""
        return generation.Regression(*self.parts(shape, key, 1))


class AbstractFieldLoss(AbstractConfiguration):
    """A loss of fields given others, or, with `next_step`, of states given those before.

    With `next_step` data are trajectories of a system whose state is a field.
    """

    next_step: bool = False

    @property
    def needs(self) -> str:
        """What it is computed on."""
        return "states" if self.next_step else "fields"


@register("configuration")
class Denoising(AbstractFieldLoss):
    """`tx.configuration.Denoising`."""

    kind: Literal["denoising"] = "denoising"
    log_sigma_mean: float = -0.5
    log_sigma_std: NonNegative = 1.2

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del stepper, clock
        return configurations.Denoising(
            self.log_sigma_mean, self.log_sigma_std, next_step=self.next_step
        )


@register("configuration")
class FieldFlowMatching(AbstractFieldLoss):
    """`tx.configuration.FieldFlowMatching`."""

    kind: Literal["field_flow_matching"] = "field_flow_matching"
    sigma: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    time_exponent: NonNegative = 0.0

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del stepper, clock
        return configurations.FieldFlowMatching(
            self.sigma, self.time_exponent, next_step=self.next_step
        )


@register("configuration")
class FieldRegression(AbstractFieldLoss):
    """`tx.configuration.FieldRegression`."""

    kind: Literal["field_regression"] = "field_regression"
    loss: Literal["mse", "mae", "rmse", "nmse", "nmae", "nrmse"] = "mse"

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del stepper, clock
        loss = getattr(losses, self.loss)
        return configurations.FieldRegression(loss, next_step=self.next_step)


class AbstractGenerator(AbstractSpec):
    """What draws from a model: `build()` gives a sampler of `tx.generation`."""


@register("generator")
class EDM(AbstractGenerator):
    """`tx.generation.EDMSampler`, for the model `denoiser`.

    Of `churn_range` null is no upper end.
    """

    kind: Literal["edm"] = "edm"
    num_steps: Count = 18
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0
    churn: NonNegative = 0.0
    churn_range: tuple[NonNegative, NonNegative | None] = (0.0, None)
    churn_noise: Positive = 1.0

    @pydantic.model_validator(mode="after")
    def _ascend(self) -> "EDM":
        low, high = self.churn_range
        if high is not None and not low <= high:
            raise ValueError(
                f"expected a churn_range that ascends, got {low} and {high}. Swap them."
            )
        if not self.sigma_min < self.sigma_max:
            raise ValueError(
                f"expected sigma_min below sigma_max, got {self.sigma_min} and "
                f"{self.sigma_max}. Swap them."
            )
        return self

    def build(self) -> Any:
        """The sampler."""
        low, high = self.churn_range
        return generation.EDMSampler(
            self.num_steps,
            self.sigma_min,
            self.sigma_max,
            self.rho,
            self.churn,
            (low, math.inf if high is None else high),
            self.churn_noise,
        )


@register("generator")
class Flow(AbstractGenerator):
    """`tx.generation.FlowSampler`, for the model `velocity`."""

    kind: Literal["flow"] = "flow"
    num_steps: Count = 16

    def build(self) -> Any:
        """The sampler."""
        return generation.FlowSampler(self.num_steps)


@register("callback")
class Generation(AbstractCallbackSpec):
    """`tx.callback.Generation`: whole draws for the first `num_fields` validation fields,
    scored by CRPS and by spectra."""

    kind: Literal["generation"] = "generation"
    sampler: Annotated[AbstractSpec, Family("generator")] = EDM()
    num_samples: Count = 8
    num_fields: Count = 16
    use_ema: bool = False

    def build(self, configuration: Any, split: data.Split) -> Any:
        """The callback."""
        del configuration
        fields = _as_fields(split.validation)
        held_out = jax.tree.map(lambda x: x[: self.num_fields], fields)
        return callbacks.Generation(
            held_out,
            self.sampler.build(),
            every=self.every,
            num_samples=self.num_samples,
            use_ema=self.use_ema,
        )


def _as_fields(part: Any) -> Any:
    """Fields of a part of the data; of trajectories, states given those before."""
    if isinstance(part, data.Samples):
        return part.arrays
    states = part.state
    after, before = (
        x.reshape(-1, *states.shape[2:]) for x in (states[:, 1:], states[:, :-1])
    )
    return generation.Fields(after, before)
