"""Convolutional long short-term memory that modulates gradients."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count, check_flag
from trainax_pk.solver._cost import Weight
from trainax_pk.solver._layers import (
    Along,
    Convolution,
    Layout,
    Padding,
    check_kernel,
    check_padding,
    make_layout,
)
from trainax_pk.solver._modulator import AbstractGradMod, positive_factor, rms_scale

Normalise = Literal["first", "each", "none"]


class LSTMState1D(eqx.Module):
    """Memory of a `ConvLSTMGradMod1D` between steps.

    Attributes:
        hidden: h, `(*points, hidden_dim)`: with the modulator's points.
        cell: c, of the same shape.
        scale: Root mean square that gradients are divided by; 0 before the first step.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import LSTMState1D
        >>> LSTMState1D(jnp.zeros((20, 8)), jnp.zeros((20, 8)), jnp.zeros(())).cell.shape
        (20, 8)
    """

    hidden: Float[Array, "*points hidden_dim"]
    cell: Float[Array, "*points hidden_dim"]
    scale: Float[Array, ""]


class LSTMState2D(eqx.Module):
    """Memory of a `ConvLSTMGradMod2D` between steps.

    Attributes:
        hidden: h, `(*points, hidden_dim)`: with the modulator's points.
        cell: c, of the same shape.
        scale: Root mean square that gradients are divided by; 0 before the first step.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import LSTMState2D
        >>> memory = jnp.zeros((16, 16, 8))
        >>> LSTMState2D(memory, memory, jnp.zeros(())).hidden.shape
        (16, 16, 8)
    """

    hidden: Float[Array, "*points hidden_dim"]
    cell: Float[Array, "*points hidden_dim"]
    scale: Float[Array, ""]


class ConvLSTMCell(eqx.Module):
    """One step of a convolutional LSTM (Shi et al. 2015, arXiv:1506.04214).

    (i, f, o, q) = W * [x, h] + b, c' = σ(f) ⊙ c + σ(i) ⊙ tanh(q), h' = σ(o) ⊙ tanh(c'),
    with * a convolution over the points of `(*points, channels)`.

    Attributes:
        gates: The convolution to 4 · hidden_dim channels, in the order i, f, o, q.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import ConvLSTMCell
        >>> cell = ConvLSTMCell(3, 8, (5,), ("zero",), key=jax.random.key(0))
        >>> memory = jnp.zeros((20, 8))
        >>> h, c = cell(jnp.ones((20, 3)), memory, memory)
        >>> h.shape, c.shape
        ((20, 8), (20, 8))
    """

    gates: Convolution

    def __init__(
        self,
        in_channels: int,
        hidden_dim: int,
        kernel: tuple[int, ...],
        padding: tuple[str, ...],
        *,
        key: PRNGKeyArray,
    ) -> None:
        sizes = (in_channels + hidden_dim, 4 * hidden_dim)
        self.gates = Convolution(sizes, kernel, padding, key=key)

    def __call__(self, x: Array, hidden: Array, cell: Array) -> tuple[Array, Array]:
        """New hidden state and new cell."""
        gates = self.gates(jnp.concatenate([x, hidden], axis=-1))
        enter, keep, leave, candidate = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
        return jax.nn.sigmoid(leave) * jnp.tanh(cell), cell


class ConvLSTMGradMod1D(AbstractGradMod):
    """Learned steps for states `(T, N)` from a convolutional LSTM.

    g = ∇U / s, (h, c) = ConvLSTM([g, x], h, c), δ = η ∇U + W h: W maps channels alone.
    s is the root mean square of the sample's gradient, by default that of the first step,
    so that later gradients tell how far the solve has come. The direct path η ∇U is left
    out unless `direct` gives it, and W starts at 0 beside it; with a preconditioner,
    whose directions are steps in themselves, take `direct=1.0, normalise="none"`.

    Along "time", points are times and variables are channels. Along "space", points are
    the variables (a ring: padding "periodic") and times are channels. Along "both",
    times and variables are a plane of one channel, with a border for each axis, as
    `padding=("zero", "periodic")` for Lorenz-96.

    With `patch=p`, p neighbours along an axis are one point of p times the channels:
    1/p of the points, each tap p times as far. Nothing is lost. Where p is the distance
    of observations, every point holds the same pattern of them.

    Compute and memory of a step are those of one convolution to 4 · hidden_dim channels.

    Attributes:
        cell: The LSTM.
        out: W.
        layout: Which axes are points.
        num_channels: Number of channels.
        normalise: "first", "each" or "none".
        with_state: Whether the LSTM sees x beside the gradient.
        direct: η, learned and kept positive, or None.

    Raises:
        ValueError: An even kernel, an unknown border, `along` or `normalise`, a count
            below 1; when called, a state of other channels, or one whose points
            `patch` does not divide.

    Source: Fablet et al. 2021, doi:10.1029/2021MS002572.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import ConvLSTMGradMod1D
        >>> modulator = ConvLSTMGradMod1D(3, 8, key=jax.random.key(0))
        >>> x = jnp.ones((20, 3))
        >>> step, memory = modulator(2 * x, x, modulator.init(x))
        >>> step.shape, memory.hidden.shape, float(memory.scale)
        ((20, 3), (20, 8), 2.0)
    """

    cell: ConvLSTMCell
    out: Convolution
    layout: Layout
    num_channels: int = eqx.field(static=True)
    normalise: str = eqx.field(static=True)
    with_state: bool = eqx.field(static=True)
    direct: Weight | None

    def __init__(
        self,
        num_channels: int,
        hidden_dim: int = 32,
        *,
        along: Along = "time",
        kernel_size: int | tuple[int, ...] = 3,
        padding: Padding | tuple[Padding, ...] = "zero",
        patch: int | tuple[int, ...] = 1,
        normalise: Normalise = "first",
        with_state: bool = True,
        direct: float | None = None,
        key: PRNGKeyArray,
    ) -> None:
        """Random weights.

        Args:
            num_channels: N along "time", T along "space", 1 along "both".
            hidden_dim: Channels of the LSTM's memory.
            along: Which axes are convolved.
            kernel_size: Odd number of taps, or one for each axis.
            padding: "zero" or "periodic", or one for each axis.
            patch: Neighbours that are one point, or one number for each axis.
            normalise: Divide by the root mean square of the "first" gradient of a
                solve, of "each", or do not ("none").
            with_state: Show x to the LSTM; states should be of order 1 then.
            direct: η > 0 before training, or None for no direct path.
            key: Key of the weights.
        """
        self.layout = make_layout(along, 2, num_channels, patch)
        self.num_channels = num_channels
        self.normalise, self.with_state = _check_input(normalise, with_state)
        self.direct = (
            None if direct is None else positive_factor("direct", direct, learned=True)
        )
        self.cell, self.out = _layers(
            self.layout, num_channels, hidden_dim, kernel_size, padding,
            with_state, key, start=0.0 if direct else 1.0,
        )  # fmt: skip

    def init(self, x: Float[Array, "T N"]) -> LSTMState1D:
        """An empty memory."""
        return LSTMState1D(*_empty(self, x))

    def __call__(
        self, gradient: Float[Array, "T N"], x: Float[Array, "T N"], state: LSTMState1D
    ) -> tuple[Float[Array, "T N"], LSTMState1D]:
        """δ and the new memory."""
        step, memory = _modulate(self, gradient, x, state)
        return step, LSTMState1D(*memory)


class ConvLSTMGradMod2D(AbstractGradMod):
    """Learned steps for states `(T, H, W)`; see `ConvLSTMGradMod1D`.

    Along "space", points are those of space and times are channels; along "both", all
    three axes are points of one channel.

    Attributes:
        cell: The LSTM.
        out: Map from its channels.
        layout: Which axes are points.
        num_channels: Number of channels.
        normalise: "first", "each" or "none".
        with_state: Whether the LSTM sees x beside the gradient.
        direct: η, learned and kept positive, or None.

    Raises:
        ValueError: As `ConvLSTMGradMod1D`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import ConvLSTMGradMod2D
        >>> modulator = ConvLSTMGradMod2D(5, 4, key=jax.random.key(0))
        >>> x = jnp.ones((5, 8, 8))
        >>> modulator.init(x).hidden.shape
        (8, 8, 4)
    """

    cell: ConvLSTMCell
    out: Convolution
    layout: Layout
    num_channels: int = eqx.field(static=True)
    normalise: str = eqx.field(static=True)
    with_state: bool = eqx.field(static=True)
    direct: Weight | None

    def __init__(
        self,
        num_channels: int,
        hidden_dim: int = 32,
        *,
        along: Along = "space",
        kernel_size: int | tuple[int, ...] = 3,
        padding: Padding | tuple[Padding, ...] = "zero",
        patch: int | tuple[int, ...] = 1,
        normalise: Normalise = "first",
        with_state: bool = True,
        direct: float | None = None,
        key: PRNGKeyArray,
    ) -> None:
        """Random weights.

        Args:
            num_channels: T along "space", 1 along "both".
            hidden_dim: Channels of the LSTM's memory.
            along: "space" or "both".
            kernel_size: Odd number of taps, or one for each axis.
            padding: "zero" or "periodic", or one for each axis.
            patch: Neighbours that are one point, or one number for each axis.
            normalise: As for `ConvLSTMGradMod1D`.
            with_state: Show x to the LSTM; states should be of order 1 then.
            direct: As for `ConvLSTMGradMod1D`.
            key: Key of the weights.
        """
        self.layout = make_layout(along, 3, num_channels, patch)
        self.num_channels = num_channels
        self.normalise, self.with_state = _check_input(normalise, with_state)
        self.direct = (
            None if direct is None else positive_factor("direct", direct, learned=True)
        )
        self.cell, self.out = _layers(
            self.layout, num_channels, hidden_dim, kernel_size, padding,
            with_state, key, start=0.0 if direct else 1.0,
        )  # fmt: skip

    def init(self, x: Float[Array, "T H W"]) -> LSTMState2D:
        """An empty memory."""
        return LSTMState2D(*_empty(self, x))

    def __call__(
        self,
        gradient: Float[Array, "T H W"],
        x: Float[Array, "T H W"],
        state: LSTMState2D,
    ) -> tuple[Float[Array, "T H W"], LSTMState2D]:
        """δ and the new memory."""
        step, memory = _modulate(self, gradient, x, state)
        return step, LSTMState2D(*memory)


def _check_input(normalise: Any, with_state: Any) -> tuple[str, bool]:
    if normalise not in ("first", "each", "none"):
        raise ValueError(
            f"Expected `normalise` to be 'first', 'each' or 'none', got {normalise!r}. "
            "Choose the gradient whose root mean square is divided by."
        )
    return normalise, check_flag("with_state", with_state)


def _layers(
    layout: Layout,
    channels: int,
    hidden: int,
    kernel_size: Any,
    padding: Any,
    with_state: bool,  # noqa: FBT001
    key: PRNGKeyArray,
    *,
    start: float,
) -> tuple[ConvLSTMCell, Convolution]:
    check_count("hidden_dim", hidden)
    num_axes, channels = layout.num_axes, channels * layout.widening
    kernel, borders = (
        check_kernel(kernel_size, num_axes),
        check_padding(padding, num_axes),
    )
    cell_key, out_key = jax.random.split(key)
    seen = channels * (2 if with_state else 1)
    cell = ConvLSTMCell(seen, hidden, kernel, borders, key=cell_key)
    out = Convolution((hidden, channels), (1,) * num_axes, borders, key=out_key)
    return cell, jax.tree.map(lambda x: start * x, out)


def _empty(modulator: Any, x: Array) -> tuple[Array, Array, Array]:
    modulator.layout.check(x, modulator.num_channels, type(modulator).__name__)
    weight = modulator.out.weight
    points = modulator.layout.points(x).shape[:-1]
    memory = jnp.zeros((*points, weight.shape[-2]), jnp.result_type(x, weight))
    return memory, memory, jnp.zeros((), x.dtype)


def _modulate(
    modulator: Any, gradient: Array, x: Array, state: Any
) -> tuple[Array, tuple[Array, Array, Array]]:
    if modulator.normalise == "none":
        scale = jnp.ones_like(state.scale)
    else:
        scale = rms_scale(gradient)
    if modulator.normalise == "first":
        # Only before the first step is the scale 0.
        scale = jnp.where(state.scale == 0, scale, state.scale)
    seen = modulator.layout.points(gradient / scale)
    if modulator.with_state:
        seen = jnp.concatenate([seen, modulator.layout.points(x)], axis=-1)
    hidden, cell = modulator.cell(seen, state.hidden, state.cell)
    step = modulator.layout.state(modulator.out(hidden))
    if modulator.direct is not None:
        step = modulator.direct.value() * gradient + step
    return step.astype(gradient.dtype), (hidden, cell, scale)
