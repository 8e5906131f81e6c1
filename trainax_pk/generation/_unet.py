"""A network of fields and a noise level."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count, check_flag
from trainax_pk.generation._fields import coarsen

_NUM_FREQUENCIES = 8
_EMBEDDING = 32
_activation: Callable[[Array], Array] = jax.nn.silu


class UNet(eqx.Module):
    """Fields and a number to fields: convolutions on grids of 1, 1/2, 1/4, … the points.

    On each level one residual block on the way down and one on the way up, beside which
    the level's fields are passed on; twice the channels on each coarser level. The number
    scales and shifts the channels within each block. The last convolution begins at 0.
    Without norm over space, and with circular borders if `periodic`: it takes grids of
    any size that the levels divide, and commutes with shifts by 2^(num_levels - 1)
    points. For L levels 2 (2 L + 1) + 2 convolutions of three points along each axis, and
    2 L - 1 of one point, beside blocks that change the number of channels.

    Attributes:
        num_levels: L.

    Raises:
        ValueError: A count out of range; when called, a field of other channels or axes,
            axes that the levels do not divide.

    Source: Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.generation import UNet
        >>> def apply(key, field):
        ...     return UNet(3, 2, hidden_channels=4, key=key)(field, jnp.array(0.1))
        >>> eqx.filter_eval_shape(apply, jax.random.key(0), jnp.ones((3, 8, 8))).shape
        (2, 8, 8)
    """

    stem: eqx.nn.Conv
    embedding: eqx.nn.MLP
    down: tuple["_Block", ...]
    middle: "_Block"
    up: tuple["_Block", ...]
    out: eqx.nn.Conv
    in_channels: int = eqx.field(static=True)
    num_axes: int = eqx.field(static=True)
    num_levels: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_axes: int = 2,
        hidden_channels: int = 16,
        num_levels: int = 3,
        periodic: bool = True,
        key: PRNGKeyArray,
    ) -> None:
        """Builds the layers.

        Args:
            in_channels: Of the field and its condition together.
            out_channels: Of the field.
            num_axes: Axes of space.
            hidden_channels: On the finest level.
            num_levels: L.
            periodic: Circular borders; else zeros stand beyond them.
            key: Key of the weights.
        """
        self.in_channels = check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        self.num_axes = check_count("num_axes", num_axes)
        self.num_levels = check_count("num_levels", num_levels)
        width = check_count("hidden_channels", hidden_channels)
        mode = "CIRCULAR" if check_flag("periodic", periodic) else "ZEROS"
        keys = iter(jax.random.split(key, 2 * num_levels + 4))
        widths = [width * 2**level for level in range(num_levels)]
        coarser = [*widths[1:], widths[-1]]
        self.stem = _conv(num_axes, in_channels, width, mode, next(keys))
        self.embedding = eqx.nn.MLP(
            1 + 2 * _NUM_FREQUENCIES, _EMBEDDING, _EMBEDDING, 1,
            _activation, _activation, key=next(keys),
        )  # fmt: skip
        self.down = tuple(
            _Block(num_axes, previous, now, mode, key=next(keys))
            for previous, now in zip([width, *widths[:-1]], widths, strict=True)
        )
        self.middle = _Block(num_axes, widths[-1], widths[-1], mode, key=next(keys))
        self.up = tuple(
            _Block(num_axes, now + below, now, mode, key=next(keys))
            for now, below in zip(widths, coarser, strict=True)
        )
        out = _conv(num_axes, width, out_channels, mode, next(keys))
        self.out = _zero(out)

    def __call__(
        self, field: Float[Array, "K *space"], noise: Float[Array, ""]
    ) -> Float[Array, "C *space"]:
        """The network's answer.

        Args:
            field: Field and condition, stacked.
            noise: What tells the noise level, between about -2 and 2.
        """
        self._check(field.shape)
        feature = self.embedding(_waves(noise))
        h, passed = self.stem(field), []
        for level, block in enumerate(self.down):
            h = coarsen(h, 2) if level else h
            h = block(h, feature)
            passed.append(h)
        h = self.middle(h, feature)
        for level in reversed(range(self.num_levels)):
            h = self.up[level](jnp.concatenate([passed[level], h]), feature)
            h = _doubled(h) if level else h
        return self.out(_activation(h))

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != self.num_axes + 1 or shape[0] != self.in_channels:
            raise ValueError(
                f"Expected a field of {self.in_channels} channels and {self.num_axes} "
                f"axes, got the shape {shape}. The network's in_channels are those of "
                "the field and of its condition together."
            )
        least = 2 ** (self.num_levels - 1)
        if any(n % least for n in shape[1:]):
            raise ValueError(
                f"Expected axes of multiples of {least} points for {self.num_levels} "
                f"levels, got {shape[1:]}. Lower num_levels, or change the grid."
            )


class _Block(eqx.Module):
    """(x + conv(act(scale · conv(act(x)) + shift))) / √2, scale and shift of the noise."""

    first: eqx.nn.Conv
    second: eqx.nn.Conv
    passing: eqx.nn.Conv | None
    modulation: eqx.nn.Linear

    def __init__(
        self,
        num_axes: int,
        in_channels: int,
        out_channels: int,
        mode: str,
        *,
        key: PRNGKeyArray,
    ) -> None:
        keys = jax.random.split(key, 4)
        self.first = _conv(num_axes, in_channels, out_channels, mode, keys[0])
        self.second = _conv(num_axes, out_channels, out_channels, mode, keys[1])
        self.passing = None
        if in_channels != out_channels:
            self.passing = eqx.nn.Conv(
                num_axes, in_channels, out_channels, 1, use_bias=False, key=keys[2]
            )
        self.modulation = eqx.nn.Linear(_EMBEDDING, 2 * out_channels, key=keys[3])

    def __call__(self, x: Array, feature: Array) -> Array:
        scale, shift = jnp.split(self.modulation(feature), 2)
        ones = (1,) * (x.ndim - 1)
        h = self.first(_activation(x))
        h = (1 + scale.reshape(-1, *ones)) * h + shift.reshape(-1, *ones)
        h = self.second(_activation(h))
        kept = x if self.passing is None else self.passing(x)
        # Sums of independent terms keep their variance.
        return (kept + h) / math.sqrt(2)


def _conv(
    num_axes: int, in_channels: int, out_channels: int, mode: str, key: PRNGKeyArray
) -> eqx.nn.Conv:
    return eqx.nn.Conv(
        num_axes, in_channels, out_channels, 3, padding="SAME", padding_mode=mode,
        key=key,
    )  # fmt: skip


def _zero(layer: eqx.nn.Conv) -> eqx.nn.Conv:
    where = lambda x: (x.weight, x.bias)  # noqa: E731
    return eqx.tree_at(where, layer, tuple(jnp.zeros_like(x) for x in where(layer)))


def _waves(noise: Array) -> Array:
    phase = jnp.pi / 2 * noise * jnp.arange(1, _NUM_FREQUENCIES + 1, dtype=noise.dtype)
    return jnp.concatenate([noise[None], jnp.cos(phase), jnp.sin(phase)])


def _doubled(x: Array) -> Array:
    """Each point twice along each axis."""
    for axis in range(1, x.ndim):
        x = jnp.repeat(x, 2, axis=axis)
    return x
