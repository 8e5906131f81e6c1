"""Encoders: features of what was observed."""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from trainax_pk._tree import as_lengths, check_count, check_flag
from trainax_pk.amortized._head import make_network


class AbstractEncoder(eqx.Module):
    """Map of one standardised observation to a vector of features.

    To add one: a final class with the fields below and `__call__(x, mask)`. x holds 0
    where the mask does not hold, `mask` is None where everything was observed. An encoder
    with `masked=True` sees which entries were: it then appends the mask to its input
    (`with_mask`). One that takes observations of a single shape has it as `shape`: others
    are then refused before they are scaled, and a fresh model has the shapes of a
    standardised one, which loads into it. Add a row to `ENCODERS` in
    `tests/test_amortized_encoders.py`.

    Attributes:
        num_features: Length of what is returned.
        masked: Whether it can be given a mask.
    """

    num_features: eqx.AbstractVar[int]
    masked: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "..."], mask: Bool[Array, "..."] | None
    ) -> Float[Array, " f"]:
        """Features of one observation."""


class IdentityEncoder(AbstractEncoder):
    """The observation itself, flattened, and behind it the mask where there may be one.

    Attributes:
        shape: Of an observation.
        masked: Whether features hold the mask.

    Raises:
        ValueError: A shape that is none; when called, an observation of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import IdentityEncoder
        >>> encoder = IdentityEncoder((2,), masked=True)
        >>> encoder(jnp.array([3.0, 0.0]), jnp.array([True, False])).tolist()
        [3.0, 0.0, 1.0, 0.0]
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    masked: bool = eqx.field(static=True)

    def __init__(self, shape: Sequence[int] | int, *, masked: bool = False) -> None:
        self.shape, self.masked = check_shape(shape), check_flag("masked", masked)

    @property
    def num_features(self) -> int:
        """Number of entries, twice with a mask."""
        return math.prod(self.shape) * (1 + self.masked)

    def __call__(
        self, x: Float[Array, "..."], mask: Bool[Array, "..."] | None
    ) -> Float[Array, " f"]:
        """Features of one observation."""
        return with_mask(x, mask, self).reshape(-1)


class MLPEncoder(AbstractEncoder):
    """A perceptron of the flattened observation (and mask).

    Attributes:
        shape: Of an observation.
        num_features: Length of the features.
        masked: Whether the mask is part of the input.
        network: The perceptron.

    Raises:
        ValueError: A count out of range; when called, an observation of another shape.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import MLPEncoder
        >>> MLPEncoder((8,), 4, key=jax.random.key(0))(jnp.ones(8), None).shape
        (4,)
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    num_features: int = eqx.field(static=True)
    masked: bool = eqx.field(static=True)
    network: eqx.nn.MLP

    def __init__(
        self,
        shape: Sequence[int] | int,
        num_features: int,
        *,
        masked: bool = False,
        width: int = 64,
        depth: int = 2,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: PRNGKeyArray,
    ) -> None:
        self.shape, self.masked = check_shape(shape), check_flag("masked", masked)
        self.num_features = check_count("num_features", num_features)
        inputs = math.prod(self.shape) * (1 + masked)
        self.network = make_network(inputs, num_features, width, depth, activation, key)

    def __call__(
        self, x: Float[Array, "..."], mask: Bool[Array, "..."] | None
    ) -> Float[Array, " f"]:
        """Features of one observation."""
        return self.network(with_mask(x, mask, self).reshape(-1))


class ConvEncoder(AbstractEncoder):
    """Convolutions of stride 2 over a line or a plane, then a linear map.

    Every stage halves the points and convolves with `kernel_size` taps; what is left is
    flattened, so that places are told apart. For fields `(channels, *space)`, windows of
    `Batch2D` `(T, H, W)` with times as channels, and those of `Batch1D` `(T, N)` with
    `channels_last=True`.

    Attributes:
        shape: Of an observation.
        num_features: Length of the features.
        masked: Whether the mask is a second set of channels.
        channels_last: Whether the last axis is that of channels, instead of the first.
        layers: The convolutions.
        out: The linear map.

    Raises:
        ValueError: A shape of other than 2 or 3 axes, too few points for the stages, an
            even kernel; when called, an observation of another shape.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import ConvEncoder
        >>> encoder = ConvEncoder((1, 32, 32), 16, key=jax.random.key(0))
        >>> jax.eval_shape(encoder, jnp.ones((1, 32, 32)), None).shape
        (16,)
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    num_features: int = eqx.field(static=True)
    masked: bool = eqx.field(static=True)
    channels_last: bool = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)
    layers: tuple[eqx.nn.Conv, ...]
    out: eqx.nn.Linear

    def __init__(
        self,
        shape: Sequence[int],
        num_features: int,
        *,
        masked: bool = False,
        hidden: Sequence[int] = (16, 32, 64),
        kernel_size: int = 3,
        channels_last: bool = False,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: PRNGKeyArray,
    ) -> None:
        """Builds the layers.

        Args:
            shape: Of an observation: channels and one or two axes of points.
            num_features: Length of the features.
            masked: Whether it can be given a mask.
            hidden: Channels after each stage.
            kernel_size: Odd number of taps per axis.
            channels_last: Where the channels are.
            activation: After each stage.
            key: Key of the weights.
        """
        self.shape, self.masked = check_shape(shape), check_flag("masked", masked)
        self.num_features = check_count("num_features", num_features)
        self.channels_last = check_flag("channels_last", channels_last)
        self.activation = activation
        if (
            len(self.shape) not in (2, 3)
            or check_count("kernel_size", kernel_size) % 2 == 0
        ):
            raise ValueError(
                "Expected a shape of channels and one or two axes of points, and an odd "
                f"kernel_size, got {self.shape} and {kernel_size}. Reshape, or use "
                "MLPEncoder."
            )
        channels, *points = self._channels_first(self.shape)
        if min(points) < 2 ** len(hidden):
            raise ValueError(
                f"Expected at least {2 ** len(hidden)} points per axis for {len(hidden)} "
                f"stages of stride 2, got {points}. Pass fewer channels in `hidden`."
            )
        widths = [channels * (1 + masked), *hidden]
        keys = jax.random.split(key, len(widths))
        self.layers = tuple(
            eqx.nn.Conv(
                len(points), widths[i], widths[i + 1], kernel_size, stride=2,
                padding=kernel_size // 2, key=keys[i],
            )
            for i in range(len(hidden))
        )  # fmt: skip
        left = math.prod(-(-n // 2 ** len(hidden)) for n in points)
        self.out = eqx.nn.Linear(widths[-1] * left, num_features, key=keys[-1])

    def __call__(
        self, x: Float[Array, "..."], mask: Bool[Array, "..."] | None
    ) -> Float[Array, " f"]:
        """Features of one observation."""
        x = with_mask(x, mask, self, axis=-1 if self.channels_last else 0)
        x = jnp.moveaxis(x, -1, 0) if self.channels_last else x
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.out(x.reshape(-1))

    def _channels_first(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[-1], *shape[:-1]) if self.channels_last else shape


class SetEncoder(AbstractEncoder):
    """ρ(mean_i φ(x_i), log(1 + n)) over a set of n independent observations.

    Features do not depend on the order of the set, which is the first axis of an
    observation, and the same weights serve sets of any size. An element of which nothing
    was observed does not count.

    Attributes:
        element: φ, an encoder of one element.
        num_features: Length of the features.
        network: ρ, a perceptron.

    Source: Zaheer et al. 2017, arXiv:1703.06114.

    Raises:
        ValueError: No encoder, a count out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import MLPEncoder, SetEncoder
        >>> keys = jax.random.split(jax.random.key(0))
        >>> encoder = SetEncoder(MLPEncoder((2,), 8, key=keys[0]), 4, key=keys[1])
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> bool(jnp.allclose(encoder(x, None), encoder(x[::-1], None), atol=1e-5))
        True
    """

    element: AbstractEncoder
    num_features: int = eqx.field(static=True)
    network: eqx.nn.MLP

    def __init__(
        self,
        element: AbstractEncoder,
        num_features: int,
        *,
        width: int = 64,
        depth: int = 1,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: PRNGKeyArray,
    ) -> None:
        self.element = check_encoder(element)
        self.num_features = check_count("num_features", num_features)
        inputs = element.num_features + 1
        self.network = make_network(inputs, num_features, width, depth, activation, key)

    @property
    def masked(self) -> bool:
        """Always: elements that are missing do not count."""
        return True

    def __call__(
        self, x: Float[Array, "n ..."], mask: Bool[Array, "n ..."] | None
    ) -> Float[Array, " f"]:
        """Features of one set."""
        seen = jnp.ones(x.shape[0], bool)
        inner = None
        if mask is not None:
            seen = jnp.any(mask.reshape(x.shape[0], -1), axis=1)
            inner = mask if self.element.masked else None
        elements = jax.vmap(self.element, in_axes=(0, None if inner is None else 0))(
            x, inner
        )
        count = jnp.sum(seen).astype(x.dtype)
        total = jnp.sum(jnp.where(seen[:, None], elements, 0.0), axis=0)
        size = jnp.log1p(count)[None]
        pooled = total / jnp.maximum(count, 1.0)
        return self.network(jnp.concatenate([pooled, size]))


def with_mask(
    x: Float[Array, "..."],
    mask: Bool[Array, "..."] | None,
    encoder: Any,
    axis: int = 0,
) -> Float[Array, "..."]:
    """x, and behind it along an axis the mask, where the encoder is built for one.

    Args:
        x: One observation, 0 in the gaps.
        mask: Which entries were observed, or None for all.
        encoder: Whose `shape` and `masked` decide.
        axis: Along which the mask is appended.

    Returns:
        Input of a network.

    Raises:
        ValueError: An observation of another shape than the encoder's.
    """
    check_seen(x, encoder)
    if not encoder.masked:
        return x
    seen = jnp.ones(x.shape, x.dtype) if mask is None else mask.astype(x.dtype)
    return jnp.concatenate([x, seen], axis=axis)


def check_seen(x: Array, encoder: Any) -> None:
    """An observation of the encoder's shape, if it has one, or a ValueError."""
    shape = shape_of(encoder)
    if shape is not None and x.shape != shape:
        raise ValueError(
            f"Expected an observation of the shape {shape}, got {x.shape}. Pass "
            "one sample (jax.vmap for a batch), or build the encoder for that shape."
        )


def shape_of(encoder: Any) -> tuple[int, ...] | None:
    """Of the observations that an encoder takes; None where it does not tell."""
    shape = getattr(encoder, "shape", None)
    return None if shape is None else _lengths(shape)


def _lengths(shape: Any) -> tuple[int, ...]:
    lengths = as_lengths(shape)
    lengths = (shape,) if lengths is None else lengths
    return tuple(check_count("shape", length) for length in lengths)


def check_shape(shape: Any) -> tuple[int, ...]:
    """A shape of at least one axis, from a sequence or one length."""
    shape = _lengths(shape)
    if not shape:
        raise ValueError(
            "Expected observations of at least one axis, got the shape (). Pass (1,)."
        )
    return shape


def check_encoder(encoder: Any) -> AbstractEncoder:
    """An encoder, or a ValueError."""
    if not isinstance(encoder, AbstractEncoder):
        raise ValueError(
            f"Expected an encoder, got {encoder!r}. Pass for example "
            "tx.amortized.MLPEncoder, or a subclass of AbstractEncoder."
        )
    return encoder
