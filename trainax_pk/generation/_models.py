"""Models that turn noise into fields: any network, preconditioned and standardised."""

import math
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from trainax_pk._tree import as_number
from trainax_pk.generation._scales import FieldScales


class AbstractFieldModel(eqx.Module):
    """A network of standardised fields, and the scales between them and data."""

    network: eqx.AbstractVar[Callable[..., Array]]
    scales: eqx.AbstractVar[FieldScales]

    def __check_init__(self) -> None:
        if not callable(self.network):
            raise ValueError(
                "Expected a network that takes a field and a noise level, got "
                f"{self.network!r}. Pass for example tx.generation.UNet."
            )
        if not isinstance(self.scales, FieldScales):
            raise ValueError(
                "Expected `scales` to be FieldScales, got "
                f"{type(self.scales).__name__}. Pass "
                "tx.generation.FieldScales(num_channels, num_condition_channels)."
            )

    def standardised(self, data: Any) -> Self:
        """The same with scales learned from data, which no training changes.

        Args:
            data: `Fields`, a tuple (target, condition), or targets where there is no
                condition; concrete.
        """
        return eqx.tree_at(lambda m: m.scales, self, self.scales.fitted(data))

    def embed(
        self, target: Float[Array, "C *space"], condition: PyTree[Array] | None = None
    ) -> tuple[Float[Array, "C *space"], Float[Array, "K *space"]]:
        """z of a field, standardised, and the condition as the network sees it."""
        return self.scales.standard(target, condition)


class Denoiser(AbstractFieldModel):
    """D(z; σ, c) = c_skip(σ) z + c_out(σ) F([c_in(σ) z, c], c_noise(σ)): E[z₀ | z].

    z = z₀ + σ n is a standardised field with noise. With s = σ_data

    c_skip = s² / (σ² + s²), c_out = σ s / √(σ² + s²), c_in = 1 / √(σ² + s²),
    c_noise = ¼ log σ: what F takes and what it has to return have variance 1 at every
    noise level. Trained by `tx.configuration.Denoising`, sampled by
    `tx.generation.EDMSampler`. One pass of the network.

    Attributes:
        network: F, any `(channels + condition channels, *space), scalar -> (channels,
            *space)`, such as `tx.generation.UNet`.
        scales: Between units of the data and standardised ones; fitted to data by
            `standardised`.
        sigma_data: s, standard deviation of z₀: 1 for standardised data.

    Raises:
        ValueError: No network, no scales, s that is not above 0; when called, shapes
            that they do not fit.

    Source: Karras et al. 2022, arXiv:2206.00364, table 1.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> denoiser = G.Denoiser(net, G.FieldScales(1, 1, num_axes=1, residual=True))
        >>> data = G.Fields(jnp.ones((3, 1, 8)), jnp.zeros((3, 1, 4)))
        >>> denoiser = denoiser.standardised(data)
        >>> z, c = denoiser.embed(jnp.ones((1, 8)), jnp.zeros((1, 4)))
        >>> denoiser.denoise(z, jnp.array(0.5), c).shape
        (1, 8)
    """

    network: Callable[..., Array]
    scales: FieldScales
    sigma_data: float = eqx.field(static=True, default=1.0, converter=as_number)

    def __check_init__(self) -> None:
        check_positive("sigma_data", self.sigma_data, "It is 1 for standardised data.")

    def denoise(
        self,
        z: Float[Array, "C *space"],
        sigma: Float[Array, ""],
        inputs: Float[Array, "K *space"],
    ) -> Float[Array, "C *space"]:
        """D(z; σ, c)."""
        sigma = jnp.asarray(sigma, z.dtype)
        s = self.sigma_data
        total = sigma**2 + s**2
        c_in, c_noise = 1 / jnp.sqrt(total), 0.25 * jnp.log(sigma)
        seen = jnp.concatenate([c_in * z, inputs.astype(z.dtype)])
        out = check_output(self.network(seen, c_noise), z)
        return s**2 / total * z + sigma * s * c_in * out


class Velocity(AbstractFieldModel):
    """v(t, z, c) = F([z, c], t): carries normal noise at t = 0 to fields at t = 1.

    Trained by `tx.configuration.FieldFlowMatching`, sampled by
    `tx.generation.FlowSampler`. One pass of the network.

    Attributes:
        network: F, as for `Denoiser`; its second argument is t.
        scales: Likewise.

    Raises:
        ValueError: As `Denoiser`.

    Source: Lipman et al. 2023, arXiv:2210.02747.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> model = G.Velocity(net, G.FieldScales(1, num_axes=1))
        >>> z, c = model.embed(jnp.ones((1, 8)))
        >>> model.velocity(jnp.array(0.5), z, c).shape
        (1, 8)
    """

    network: Callable[..., Array]
    scales: FieldScales

    def velocity(
        self,
        t: Float[Array, ""],
        z: Float[Array, "C *space"],
        inputs: Float[Array, "K *space"],
    ) -> Float[Array, "C *space"]:
        """v(t, z, c)."""
        seen = jnp.concatenate([z, inputs.astype(z.dtype)])
        return check_output(self.network(seen, jnp.asarray(t, z.dtype)), z)


class Regression(AbstractFieldModel):
    """u(c) = base + mean + std · F(c, 0): one field per condition, without noise.

    What a generative model of the same network is compared with. Trained by
    `tx.configuration.FieldRegression`.

    Attributes:
        network: F, `(condition channels, *space), scalar -> (channels, *space)`.
        scales: As for `Denoiser`.

    Raises:
        ValueError: As `Denoiser`; scales without condition.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> model = G.Regression(net, G.FieldScales(1, 1, num_axes=1, residual=True))
        >>> model(jnp.ones((1, 4)), space=(8,)).shape
        (1, 8)
    """

    network: Callable[..., Array]
    scales: FieldScales

    def __check_init__(self) -> None:
        if not self.scales.num_condition_channels:
            raise ValueError(
                "Expected scales with a condition for a regression, got 0 channels. Pass "
                "FieldScales(num_channels, num_condition_channels)."
            )

    def __call__(
        self, condition: PyTree[Array], *, space: tuple[int, ...] | None = None
    ) -> Float[Array, "C *space"]:
        """The field of one condition.

        Args:
            condition: Leaves `(C_i, *space_i)`.
            space: Points along each axis; None for the finest grid of the condition.
        """
        inputs = self.scales.inputs(condition, self.scales.space_of(condition, space))
        inputs = inputs.astype(network_dtype(self.network, inputs))
        out = self.network(inputs, jnp.zeros((), inputs.dtype))
        return self.scales.physical(out, condition)


def network_dtype(model: Any, inputs: Array) -> Any:
    """The dtype that a model computes in: of its weights, if it has any."""
    arrays = (*jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)), inputs)
    # Weights of a spectral layer are complex.
    known = [x.dtype for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    return known[0] if known else jnp.result_type(float)


def check_output(out: Array, z: Array) -> Array:
    """A network's answer of the shape of the field, or a ValueError."""
    if jnp.shape(out) != z.shape:
        raise ValueError(
            f"Expected the network to return the field's shape {z.shape}, got "
            f"{jnp.shape(out)}. Build it with {z.shape[0]} output channels."
        )
    return out


def check_positive(name: str, value: Any, hint: str) -> float:
    """A finite number above 0, or a ValueError."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"Expected `{name}` to be a number > 0, got {value!r}. {hint}")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be kept beside arrays."""
    numbers = int | float | np.integer | np.floating
    return isinstance(value, numbers) and not isinstance(value, bool)
