"""Convolutions whose borders are chosen axis by axis, and the layout they work in."""

import functools
import math
from collections.abc import Callable
from operator import add
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count

Padding = Literal["zero", "periodic"]
Along = Literal["time", "space", "both"]


class Convolution(eqx.Module):
    """Convolution of `(*points, channels)` that keeps the points, one border per axis.

    y(p) = b + Σ_τ W_τ x(p + τ) over the taps |τ_i| <= (kernel_i − 1) / 2; beyond the
    border stands 0, or what the other end holds. Weights do not depend on the number of
    points. Without taps it is a map of channels alone.

    Written as one matrix product of all taps: a solver's steps run in a loop, where XLA
    on a CPU has no fast convolution, least of all for second derivatives (10 times and
    more).
    """

    weight: Float[Array, "*kernel in out"]
    bias: Float[Array, " out"]
    padding: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, int],
        kernel: tuple[int, ...],
        padding: tuple[str, ...],
        *,
        key: PRNGKeyArray,
    ) -> None:
        """Uniform weights in ±1/√fan_in.

        Args:
            channels: In and out.
            kernel: Odd numbers of taps, one per axis.
            padding: "zero" or "periodic", one per axis.
            key: Key of the weights.
        """
        limit = 1 / math.sqrt(channels[0] * math.prod(kernel))
        w_key, b_key = jax.random.split(key)
        self.weight = jax.random.uniform(
            w_key, (*kernel, *channels), minval=-limit, maxval=limit
        )
        self.bias = jax.random.uniform(
            b_key, (channels[1],), minval=-limit, maxval=limit
        )
        self.padding = padding

    def __call__(self, x: Float[Array, "*points in"]) -> Float[Array, "*points out"]:
        """The convolution of one sample."""
        out = _convolve(x, self.weight, self.padding)
        return out + jnp.broadcast_to(self.bias, out.shape)

    def outside_loops(
        self, x: Float[Array, "*points in"]
    ) -> Float[Array, "*points out"]:
        """The same by XLA's convolution, in single precision faster on a CPU.

        Inside a loop its derivatives are slow there, unless the loop is compiled with
        `tx.engine.fast_convolutions`, as the trainer's are.
        """
        kernel, dtype = self.weight.shape[:-2], jnp.result_type(x, self.weight)
        if dtype == jnp.float64:
            return self(x)
        for axis, (taps, border) in enumerate(zip(kernel, self.padding, strict=True)):
            x = _padded(x, axis, taps // 2, border)
        letters = "HWD"[: len(kernel)]
        out = jax.lax.conv_general_dilated(
            x[None].astype(dtype),
            self.weight.astype(dtype),
            (1,) * len(kernel),
            "VALID",
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )[0]
        return out + jnp.broadcast_to(self.bias, out.shape)


class Layout(eqx.Module):
    """Which axes of a state `(T, *space)` are points and which are channels.

    Attributes:
        along: "time": points are times, the variables are channels. "space": points
            are those of space, the times are channels. "both": all axes are points of
            one channel.
        rank: Number of axes of a state: 2 or 3.
        patch: Neighbours along each axis of points that are one point with as many
            times the channels.
    """

    along: str = eqx.field(static=True)
    rank: int = eqx.field(static=True)
    patch: tuple[int, ...] = eqx.field(static=True)

    @property
    def num_axes(self) -> int:
        """Number of axes that are points."""
        return _num_axes(self.along, self.rank)

    @property
    def widening(self) -> int:
        """Channels of a point over those of a state."""
        return math.prod(self.patch)

    def points(self, x: Array) -> Array:
        """`(T, *space)` as `(*points, channels)`."""
        if self.along == "time":
            fine = x
        else:
            fine = x[..., None] if self.along == "both" else jnp.moveaxis(x, 0, -1)
        return fine if self.widening == 1 else _folded(fine, self.patch)

    def state(self, x: Array) -> Array:
        """`(*points, channels)` as `(T, *space)`."""
        fine = x if self.widening == 1 else _unfolded(x, self.patch)
        if self.along == "time":
            return fine
        return fine[..., 0] if self.along == "both" else jnp.moveaxis(fine, -1, 0)

    def check(self, x: Array, num_channels: int, who: str) -> None:
        """A state of this layout, or a ValueError."""
        axes = "(T, N)" if self.rank == 2 else "(T, H, W)"
        channel = {"time": x.ndim - 1, "space": 0, "both": None}[self.along]
        given = 1 if channel is None or x.ndim == 0 else x.shape[channel]
        if x.ndim != self.rank or given != num_channels:
            raise ValueError(
                f"Expected {who} to get a state {axes} with {num_channels} channels "
                f"(along={self.along!r}), got the shape {list(x.shape)}. Pass one "
                "sample (jax.vmap for a batch), and build it for these channels."
            )


def make_layout(
    along: Any, rank: int, num_channels: Any, patch: int | tuple[int, ...] = 1
) -> Layout:
    """A layout, its options checked."""
    allowed = ("time", "space", "both") if rank == 2 else ("space", "both")
    if along not in allowed:
        raise ValueError(f"Expected `along` to be one of {allowed}, got {along!r}.")
    check_count("num_channels", num_channels)
    if along == "both" and num_channels != 1:
        raise ValueError(
            f"Expected num_channels=1 with along='both', got {num_channels}. All axes "
            "are points there; pass 1, or another `along`."
        )
    num_axes = _num_axes(along, rank)
    sizes = patch if isinstance(patch, tuple) else (patch,) * num_axes
    if len(sizes) != num_axes:
        raise ValueError(
            f"Expected `patch` to be an integer or {num_axes} of them, got {patch!r}. "
            "Pass one for each axis that is convolved."
        )
    return Layout(along, rank, tuple(check_count("patch", size) for size in sizes))


def check_kernel(kernel_size: Any, num_axes: int) -> tuple[int, ...]:
    """Odd numbers of taps, one per axis."""
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * num_axes
    if len(sizes) != num_axes:
        raise ValueError(
            f"Expected `kernel_size` to be an odd integer or {num_axes} of them, got "
            f"{kernel_size!r}. Pass one for each axis that is convolved."
        )
    for size in sizes:
        check_count("kernel_size", size)
        if size % 2 == 0:
            raise ValueError(
                f"Expected `kernel_size` to be odd, got {size}. An even kernel has no "
                f"centre and would shift the field; pass {size - 1} or {size + 1}."
            )
    return sizes


def check_padding(padding: Any, num_axes: int) -> tuple[str, ...]:
    """ "zero" or "periodic", one per axis."""
    borders = padding if isinstance(padding, tuple) else (padding,) * num_axes
    known = all(border in ("zero", "periodic") for border in borders)
    if len(borders) != num_axes or not known:
        raise ValueError(
            f"Expected `padding` to be 'zero', 'periodic', or {num_axes} of these, got "
            f"{padding!r}. Pass one for each axis that is convolved, in their order."
        )
    return borders


def check_activation(activation: Any) -> Callable[[Array], Array]:
    """A function of an array, or a ValueError."""
    if not callable(activation):
        raise ValueError(
            f"Expected `activation` to be a function, got {activation!r}. Pass for "
            "example jax.nn.relu."
        )
    return activation


def check_divides(downsample: int, x: Array, who: str) -> None:
    """Every number of points must be a multiple of the factor."""
    if any(points % downsample for points in x.shape[:-1]):
        raise ValueError(
            f"Expected {who} with downsample={downsample} to get numbers of points that "
            f"it divides, got {list(x.shape[:-1])}. Change one of the two."
        )


def pooled(x: Float[Array, "*points c"], factor: int) -> Float[Array, "*coarse c"]:
    """Means over blocks of `factor` points along every axis."""
    for axis in range(x.ndim - 1):
        shape = (*x.shape[:axis], -1, factor, *x.shape[axis + 1 :])
        x = x.reshape(shape).mean(axis=axis + 1)
    return x


def repeated(x: Float[Array, "*coarse c"], factor: int) -> Float[Array, "*points c"]:
    """Every point `factor` times along every axis."""
    for axis in range(x.ndim - 1):
        x = jnp.repeat(x, factor, axis=axis)
    return x


def _num_axes(along: str, rank: int) -> int:
    return {"time": 1, "space": rank - 1, "both": rank}[along]


def _folded(x: Array, patch: tuple[int, ...]) -> Array:
    """`(*points, c)` as `(*points / patch, c · prod(patch))`."""
    if any(n % p for n, p in zip(x.shape[:-1], patch, strict=True)):
        raise ValueError(
            f"Expected numbers of points that patch={patch} divides, got "
            f"{list(x.shape[:-1])}. Change one of the two."
        )
    shape = [
        size for n, p in zip(x.shape[:-1], patch, strict=True) for size in (n // p, p)
    ]
    blocks = x.reshape(*shape, x.shape[-1])
    axes, count = range(2 * len(patch)), x.shape[-1] * math.prod(patch)
    blocks = blocks.transpose(*axes[::2], *axes[1::2], 2 * len(patch))
    return blocks.reshape(*blocks.shape[: len(patch)], count)


def _unfolded(x: Array, patch: tuple[int, ...]) -> Array:
    """The inverse of `_folded`."""
    rank, points = len(patch), x.shape[:-1]
    blocks = x.reshape(*points, *patch, -1)
    pairs = [axis for i in range(rank) for axis in (i, rank + i)]
    fine = [n * p for n, p in zip(points, patch, strict=True)]
    return blocks.transpose(*pairs, 2 * rank).reshape(*fine, blocks.shape[-1])


# What is gathered for the taps is as many times larger than x; gathering it again in the
# backward pass costs little.
@functools.partial(jax.checkpoint, static_argnums=2)
def _convolve(x: Array, weight: Array, padding: tuple[str, ...]) -> Array:
    kernel, points = weight.shape[:-2], x.shape[:-1]
    for axis, (taps, border) in enumerate(zip(kernel, padding, strict=True)):
        x = _padded(x, axis, taps // 2, border)
    taps = [
        jax.lax.slice(x, (*tap, 0), (*map(add, tap, points), x.shape[-1]))
        for tap in np.ndindex(*kernel)
    ]
    return jnp.concatenate(taps, axis=-1) @ weight.reshape(-1, weight.shape[-1])


def _padded(x: Array, axis: int, width: int, border: str) -> Array:
    if width == 0:
        return x
    if border == "periodic" and width > x.shape[axis]:
        raise ValueError(
            f"Expected at least {width} points along a periodic axis, got "
            f"{x.shape[axis]}. Pass a smaller kernel_size."
        )
    widths = [(0, 0)] * x.ndim
    widths[axis] = (width, width)
    return jnp.pad(x, widths, mode="wrap" if border == "periodic" else "constant")
