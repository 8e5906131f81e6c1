"""Models that generate fields, by name: data, networks, losses, samplers, a callback."""

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
        return model.standardised(train.arrays)


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

    kind: Literal["single_field"] = "single_field"

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The model, with scales of 1 until `fitted` learns them."""
        return generation.Regression(*self.parts(shape, key, 1))


@register("configuration")
class Denoising(AbstractConfiguration):
    """`tx.configuration.Denoising`."""

    needs: ClassVar[str] = "fields"
    kind: Literal["denoising"] = "denoising"
    log_sigma_mean: float = -0.5
    log_sigma_std: NonNegative = 1.2

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del stepper, clock
        return configurations.Denoising(self.log_sigma_mean, self.log_sigma_std)


@register("configuration")
class FieldFlowMatching(AbstractConfiguration):
    """`tx.configuration.FieldFlowMatching`."""

    needs: ClassVar[str] = "fields"
    kind: Literal["field_flow_matching"] = "field_flow_matching"
    sigma: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    time_exponent: NonNegative = 0.0

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del stepper, clock
        return configurations.FieldFlowMatching(self.sigma, self.time_exponent)


@register("configuration")
class FieldRegression(AbstractConfiguration):
    """`tx.configuration.FieldRegression`."""

    needs: ClassVar[str] = "fields"
    kind: Literal["field_regression"] = "field_regression"
    loss: Literal["mse", "mae", "rmse", "nmse", "nmae", "nrmse"] = "mse"

    def build(self, stepper: Any, clock: Clocks) -> Any:
        """The configuration."""
        del stepper, clock
        return configurations.FieldRegression(getattr(losses, self.loss))


class AbstractGenerator(AbstractSpec):
    """What draws from a model: `build()` gives a sampler of `tx.generation`."""


@register("generator")
class EDM(AbstractGenerator):
    """`tx.generation.EDMSampler`, for the model `denoiser`."""

    kind: Literal["edm"] = "edm"
    num_steps: Count = 18
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0
    churn: NonNegative = 0.0

    @pydantic.model_validator(mode="after")
    def _ascend(self) -> "EDM":
        if not self.sigma_min < self.sigma_max:
            raise ValueError(
                f"expected sigma_min below sigma_max, got {self.sigma_min} and "
                f"{self.sigma_max}. Swap them."
            )
        return self

    def build(self) -> Any:
        """The sampler."""
        return generation.EDMSampler(
            self.num_steps, self.sigma_min, self.sigma_max, self.rho, self.churn
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
        held_out = jax.tree.map(lambda x: x[: self.num_fields], split.validation.arrays)
        return callbacks.Generation(
            held_out,
            self.sampler.build(),
            every=self.every,
            num_samples=self.num_samples,
            use_ema=self.use_ema,
        )
