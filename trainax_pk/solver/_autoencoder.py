"""Convolutional priors whose weights know nothing of the size of the field."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count
from trainax_pk.solver._layers import (
    Along,
    Convolution,
    Layout,
    Padding,
    check_activation,
    check_divides,
    check_kernel,
    check_padding,
    make_layout,
    pooled,
    repeated,
)
from trainax_pk.solver._prior import AbstractPrior

Activation = Callable[[Array], Array]


class _Bilinear(eqx.Module):
    """h = a(W₁x), out = W₄[W₂h, (W₃h) ⊙ (W₃'h)], between pooling and repetition."""

    first: Convolution
    linear: Convolution
    left: Convolution
    right: Convolution
    last: Convolution
    activation: Activation
    downsample: int = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        hidden = self.activation(self.first(pooled(x, self.downsample)))
        product = self.left(hidden) * self.right(hidden)
        joined = jax.numpy.concatenate([self.linear(hidden), product], axis=-1)
        return repeated(self.last(joined), self.downsample)


class _Encoder(eqx.Module):
    """Two layers down to a coarse code of few channels, and two layers back."""

    layers: tuple[Convolution, ...]
    activation: Activation
    downsample: int = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        first, code, back, last = self.layers
        hidden = self.activation(first(x))
        latent = code(pooled(hidden, self.downsample))
        hidden = self.activation(back(repeated(latent, self.downsample)))
        return last(hidden)


class BilinAEPrior1D(AbstractPrior):
    """Bilinear convolutional prior for states `(T, N)`.

    Φ(x) = W₄ * [W₂ * h, (W₃ * h) ⊙ (W₃' * h)] with h = a(W₁ * x), * a convolution: the
    product holds what quadratic dynamics need, as in Lorenz's systems (Fablet et al.
    2021, arXiv:2007.12941). W₁ and W₄ see `kernel_size` points, the others one.

    Weights depend on channels and kernel alone: kernel · channels · hidden_dim +
    3 · hidden_dim² + 2 · kernel · hidden_dim · channels of them, and biases, however
    many points there are.

    Attributes:
        network: The layers.
        layout: Which axes are points.
        num_channels: Number of channels.

    Raises:
        ValueError: An even kernel, an unknown border or `along`, a count below 1; when
            called, a state of other channels, points that `downsample` does not divide.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import BilinAEPrior1D
        >>> prior = BilinAEPrior1D(3, 8, key=jax.random.key(0))
        >>> prior(jnp.ones((200, 3))).shape, prior(jnp.ones((50, 3))).shape
        ((200, 3), (50, 3))
    """

    network: _Bilinear
    layout: Layout
    num_channels: int = eqx.field(static=True)

    def __init__(
        self,
        num_channels: int,
        hidden_dim: int = 32,
        *,
        along: Along = "time",
        kernel_size: int | tuple[int, ...] = 3,
        padding: Padding | tuple[Padding, ...] = "zero",
        downsample: int = 1,
        activation: Activation = jax.nn.relu,
        key: PRNGKeyArray,
    ) -> None:
        """Random weights.

        Args:
            num_channels: N along "time", T along "space", 1 along "both".
            hidden_dim: Hidden channels.
            along: "time": points are times, variables are channels. "space": points
                are the variables (a ring, a line), times are channels. "both": a plane
                of times and variables with one channel.
            kernel_size: Odd number of taps, or one for each axis.
            padding: "zero" or "periodic", or one for each axis.
            downsample: Blocks of so many points along each axis are averaged first and
                filled with one value at the end.
            activation: Function of an array.
            key: Key of the weights.
        """
        self.layout = make_layout(along, 2, num_channels)
        self.num_channels = num_channels
        self.network = _bilinear(
            self.layout.num_axes, num_channels, hidden_dim, kernel_size, padding,
            downsample, activation, key,
        )  # fmt: skip

    def __call__(self, x: Float[Array, "T N"]) -> Float[Array, "T N"]:
        """Φ(x) of one window."""
        return _apply(self, x)


class BilinAEPrior2D(AbstractPrior):
    """Bilinear convolutional prior for states `(T, H, W)`; see `BilinAEPrior1D`.

    Points are those of space and times are channels (along "space"), or all three axes
    are points of one channel ("both").

    Attributes:
        network: The layers.
        layout: Which axes are points.
        num_channels: Number of channels.

    Raises:
        ValueError: As `BilinAEPrior1D`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import BilinAEPrior2D
        >>> prior = BilinAEPrior2D(5, 4, downsample=2, key=jax.random.key(0))
        >>> prior(jnp.ones((5, 16, 12))).shape
        (5, 16, 12)
    """

    network: _Bilinear
    layout: Layout
    num_channels: int = eqx.field(static=True)

    def __init__(
        self,
        num_channels: int,
        hidden_dim: int = 32,
        *,
        along: Along = "space",
        kernel_size: int | tuple[int, ...] = 3,
        padding: Padding | tuple[Padding, ...] = "zero",
        downsample: int = 1,
        activation: Activation = jax.nn.relu,
        key: PRNGKeyArray,
    ) -> None:
        """Random weights.

        Args:
            num_channels: T along "space", 1 along "both".
            hidden_dim: Hidden channels.
            along: "space" or "both".
            kernel_size: Odd number of taps, or one for each axis.
            padding: "zero" or "periodic", or one for each axis.
            downsample: As for `BilinAEPrior1D`.
            activation: Function of an array.
            key: Key of the weights.
        """
        self.layout = make_layout(along, 3, num_channels)
        self.num_channels = num_channels
        self.network = _bilinear(
            self.layout.num_axes, num_channels, hidden_dim, kernel_size, padding,
            downsample, activation, key,
        )  # fmt: skip

    def __call__(self, x: Float[Array, "T H W"]) -> Float[Array, "T H W"]:
        """Φ(x) of one window."""
        return _apply(self, x)


class ConvAEPrior1D(AbstractPrior):
    """Convolutional autoencoder as prior for states `(T, N)`.

    Φ = D ∘ E: convolution to `hidden_dim` channels, means over blocks of `downsample`
    points, convolution to `latent_dim` channels, and the same way back. The code of
    `latent_dim` numbers per block is all that passes.

    Attributes:
        network: The layers.
        layout: Which axes are points.
        num_channels: Number of channels.

    Raises:
        ValueError: As `BilinAEPrior1D`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import ConvAEPrior1D
        >>> prior = ConvAEPrior1D(3, 8, latent_dim=2, key=jax.random.key(0))
        >>> prior(jnp.ones((20, 3))).shape
        (20, 3)
    """

    network: _Encoder
    layout: Layout
    num_channels: int = eqx.field(static=True)

    def __init__(
        self,
        num_channels: int,
        hidden_dim: int = 32,
        *,
        latent_dim: int = 4,
        along: Along = "time",
        kernel_size: int | tuple[int, ...] = 3,
        padding: Padding | tuple[Padding, ...] = "zero",
        downsample: int = 2,
        activation: Activation = jax.nn.relu,
        key: PRNGKeyArray,
    ) -> None:
        """Random weights.

        Args:
            num_channels: As for `BilinAEPrior1D`.
            hidden_dim: Channels between.
            latent_dim: Channels of the code.
            along: As for `BilinAEPrior1D`.
            kernel_size: Odd number of taps, or one for each axis.
            padding: "zero" or "periodic", or one for each axis.
            downsample: Points of a block, along each axis.
            activation: Function of an array.
            key: Key of the weights.
        """
        self.layout = make_layout(along, 2, num_channels)
        self.num_channels = num_channels
        self.network = _encoder(
            self.layout.num_axes, (num_channels, hidden_dim, latent_dim), kernel_size,
            padding, downsample, activation, key,
        )  # fmt: skip

    def __call__(self, x: Float[Array, "T N"]) -> Float[Array, "T N"]:
        """Φ(x) of one window."""
        return _apply(self, x)


class ConvAEPrior2D(AbstractPrior):
    """Convolutional autoencoder as prior for states `(T, H, W)`; see `ConvAEPrior1D`.

    Attributes:
        network: The layers.
        layout: Which axes are points.
        num_channels: Number of channels.

    Raises:
        ValueError: As `BilinAEPrior1D`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import ConvAEPrior2D
        >>> prior = ConvAEPrior2D(5, 4, padding="periodic", key=jax.random.key(0))
        >>> prior(jnp.ones((5, 8, 8))).shape
        (5, 8, 8)
    """

    network: _Encoder
    layout: Layout
    num_channels: int = eqx.field(static=True)

    def __init__(
        self,
        num_channels: int,
        hidden_dim: int = 32,
        *,
        latent_dim: int = 4,
        along: Along = "space",
        kernel_size: int | tuple[int, ...] = 3,
        padding: Padding | tuple[Padding, ...] = "zero",
        downsample: int = 2,
        activation: Activation = jax.nn.relu,
        key: PRNGKeyArray,
    ) -> None:
        """Random weights.

        Args:
            num_channels: As for `BilinAEPrior2D`.
            hidden_dim: Channels between.
            latent_dim: Channels of the code.
            along: "space" or "both".
            kernel_size: Odd number of taps, or one for each axis.
            padding: "zero" or "periodic", or one for each axis.
            downsample: Points of a block, along each axis.
            activation: Function of an array.
            key: Key of the weights.
        """
        self.layout = make_layout(along, 3, num_channels)
        self.num_channels = num_channels
        self.network = _encoder(
            self.layout.num_axes, (num_channels, hidden_dim, latent_dim), kernel_size,
            padding, downsample, activation, key,
        )  # fmt: skip

    def __call__(self, x: Float[Array, "T H W"]) -> Float[Array, "T H W"]:
        """Φ(x) of one window."""
        return _apply(self, x)


def _apply(prior: Any, x: Array) -> Array:
    who = type(prior).__name__
    prior.layout.check(x, prior.num_channels, who)
    points = prior.layout.points(x)
    check_divides(prior.network.downsample, points, who)
    return prior.layout.state(prior.network(points))


def _bilinear(
    num_axes: int,
    channels: int,
    hidden: int,
    kernel_size: Any,
    padding: Any,
    downsample: int,
    activation: Activation,
    key: PRNGKeyArray,
) -> _Bilinear:
    check_count("hidden_dim", hidden)
    wide, ones = check_kernel(kernel_size, num_axes), (1,) * num_axes
    borders = check_padding(padding, num_axes)
    sizes = [
        ((channels, hidden), wide),
        *([((hidden, hidden), ones)] * 3),
        ((2 * hidden, channels), wide),
    ]
    keys = jax.random.split(key, len(sizes))
    layers = [
        Convolution(size, kernel, borders, key=k)
        for (size, kernel), k in zip(sizes, keys, strict=True)
    ]
    return _Bilinear(
        *layers, check_activation(activation), check_count("downsample", downsample)
    )


def _encoder(
    num_axes: int,
    dims: tuple[int, int, int],
    kernel_size: Any,
    padding: Any,
    downsample: int,
    activation: Activation,
    key: PRNGKeyArray,
) -> _Encoder:
    channels, hidden, latent = dims
    check_count("hidden_dim", hidden)
    check_count("latent_dim", latent)
    kernel, borders = (
        check_kernel(kernel_size, num_axes),
        check_padding(padding, num_axes),
    )
    sizes = [(channels, hidden), (hidden, latent), (latent, hidden), (hidden, channels)]
    layers = tuple(
        Convolution(size, kernel, borders, key=k)
        for size, k in zip(sizes, jax.random.split(key, 4), strict=True)
    )
    return _Encoder(
        layers, check_activation(activation), check_count("downsample", downsample)
    )
