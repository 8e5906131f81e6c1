"""Ways to write one convolution, equal in value and unequal in speed.

Every form maps `(lhs, rhs, convolution)` to what `conv_general_dilated` gives. In the
formulas n counts samples, c and o the input and output channels, p the output points and
k the taps of the kernel; strides, dilations and padding are left out:

    y[n, o, p] = Σ_c Σ_k x[n, c, p + k] w[o, c, k].
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Convolution(NamedTuple):
    """Sizes and settings of one group of a convolution.

    Attributes:
        batch: N, number of samples.
        in_channels: C.
        out_channels: O.
        taps: Kernel size by dimension.
        points: Output size by dimension.
        groups: How many such convolutions the equation holds side by side.
        dtype: Of both operands.
        params: Of the equation.
    """

    batch: int
    in_channels: int
    out_channels: int
    taps: tuple[int, ...]
    points: tuple[int, ...]
    groups: int
    dtype: Any
    params: dict[str, Any]

    @property
    def num_dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.taps)

    @property
    def multiply_adds(self) -> int:
        """Per group: N·O·C·|p|·|k|."""
        channels = self.in_channels * self.out_channels
        return self.batch * channels * math.prod(self.taps) * math.prod(self.points)

    @property
    def is_padded(self) -> bool:
        """Whether zeros lie around or between the input's points."""
        around = any(amount != 0 for pair in self.params["padding"] for amount in pair)
        return around or any(d > 1 for d in self.params["lhs_dilation"])

    @property
    def is_kernel_gradient(self) -> bool:
        """Whether it has more taps than output points, as a gradient by kernel has."""
        return math.prod(self.taps) > math.prod(self.points)


def read_convolution(eqn: Any) -> Convolution:
    """Sizes and settings of a `conv_general_dilated` equation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from trainax_pk.engine._convolution_forms import read_convolution
        >>> def conv(x, w):
        ...     return jax.lax.conv_general_dilated(x, w, (1,), "VALID")
        >>> jaxpr = jax.make_jaxpr(conv)(jnp.ones((8, 3, 30)), jnp.ones((5, 3, 2)))
        >>> found = read_convolution(jaxpr.jaxpr.eqns[-1])
        >>> found.batch, found.in_channels, found.out_channels, found.points
        (8, 3, 5, (29,))
    """
    lhs, rhs = (v.aval for v in eqn.invars)
    out = eqn.outvars[0].aval
    left, right, result = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    return Convolution(
        batch=lhs.shape[left[0]] // eqn.params["batch_group_count"],
        in_channels=rhs.shape[right[1]],
        out_channels=rhs.shape[right[0]] // groups,
        taps=tuple(rhs.shape[i] for i in right[2:]),
        points=tuple(out.shape[i] for i in result[2:]),
        groups=groups,
        dtype=lhs.dtype,
        params=eqn.params,
    )


def channels_last(lhs: jax.Array, rhs: jax.Array, conv: Convolution) -> jax.Array:
    """The layout that XLA's CPU convolution kernels need: `(n, p, c)`, `(k, c, o)`."""
    left, right, _ = conv.params["dimension_numbers"]
    num = conv.num_dims
    space = range(1, num + 1)
    numbers = lax.ConvDimensionNumbers(
        (0, num + 1, *space), (num + 1, num, *range(num)), (0, num + 1, *space)
    )
    out = lax.conv_general_dilated_p.bind(
        lax.transpose(lhs, (left[0], *left[2:], left[1])),
        lax.transpose(rhs, (*right[2:], right[1], right[0])),
        **(conv.params | {"dimension_numbers": numbers}),
    )
    return _to_result(out, conv, channel_axis=num + 1)


def one_by_one(lhs: jax.Array, rhs: jax.Array, conv: Convolution) -> jax.Array:
    """A kernel of one tap: `y[n] = w x[n]`, a batch of matrix products, no transpose."""
    left, right, _ = conv.params["dimension_numbers"]
    x = lax.transpose(lhs, left)
    w = lax.reshape(lax.transpose(rhs, right), (1, conv.out_channels, conv.in_channels))
    w = jnp.broadcast_to(w, (conv.batch, *w.shape[1:]))
    x = lax.reshape(x, (conv.batch, conv.in_channels, math.prod(conv.points)))
    out = _dot(w, x, (((2,), (1,)), ((0,), (0,))), conv)
    out = lax.reshape(out, (conv.batch, conv.out_channels, *conv.points))
    return _to_result(out, conv, channel_axis=1)


def tap_products(lhs: jax.Array, rhs: jax.Array, conv: Convolution) -> jax.Array:
    """One matrix product per tap, summed; or one per output point if those are fewer.

    `y[·, o, ·] = Σ_k x[·, ·, · + k] w[o, ·, k]` or
    `y[n, o, p] = x[n, ·, p + ·] · w[o, ·, ·]`.
    """
    left, right, _ = conv.params["dimension_numbers"]
    num = conv.num_dims
    if conv.is_kernel_gradient and conv.batch * conv.out_channels == 1:
        # Scalar products of arrays as they lie: nothing is transposed.
        x, w = lax.transpose(_padded(lhs, conv), left)[0], lax.transpose(rhs, right)[0]
        every = tuple(range(num + 1))
        parts = [
            _dot(piece, w, ((every, every), ((), ())), conv)
            for _, piece in _pieces(x, conv, axis=1)
        ]
        out = lax.reshape(jnp.stack(parts), (1, *conv.points, 1))
        return _to_result(out, conv, channel_axis=num + 1)
    x = lax.transpose(_padded(lhs, conv), (left[0], *left[2:], left[1]))
    w = lax.transpose(rhs, (*right[2:], right[1], right[0]))
    if conv.is_kernel_gradient:
        numbers = ((tuple(range(1, num + 2)), tuple(range(num + 1))), ((), ()))
        parts = [_dot(piece, w, numbers, conv) for _, piece in _pieces(x, conv, axis=1)]
        out = jnp.stack(parts, axis=1)
        out = lax.reshape(out, (conv.batch, *conv.points, conv.out_channels))
    else:
        numbers = (((num + 1,), (0,)), ((), ()))
        out = sum(
            _dot(piece, w[tap], numbers, conv)
            for tap, piece in _pieces(x, conv, axis=1)
        )
    return _to_result(out, conv, channel_axis=num + 1)


def shift_and_add(lhs: jax.Array, rhs: jax.Array, conv: Convolution) -> jax.Array:
    """Shifted copies times numbers, summed in one fused loop: for very few terms.

    Not for gradients by the kernel, whose taps are the many output points.
    """
    left, right, _ = conv.params["dimension_numbers"]
    x = lax.transpose(_padded(lhs, conv), left)
    w = lax.transpose(rhs, right)
    shape = (conv.batch, conv.out_channels, *conv.points)
    out = None
    for tap, piece in _pieces(x, conv, axis=2):
        for channel in range(conv.in_channels):
            source = piece[:, channel : channel + 1]
            factor = lax.broadcast_in_dim(w[(slice(None), channel, *tap)], shape, (1,))
            term = jnp.broadcast_to(source, shape) * factor
            out = term if out is None else out + term
    return _to_result(out, conv, channel_axis=1)


def group_after_group(form: Any) -> Any:
    """A form of grouped convolutions out of one of single ones, written out."""

    def grouped(lhs: jax.Array, rhs: jax.Array, conv: Convolution) -> jax.Array:
        axis, one = _single(conv)
        _, right, result = conv.params["dimension_numbers"]
        parts = [
            form(x, w, one)
            for x, w in zip(
                _split(lhs, conv.groups, axis),
                _split(rhs, conv.groups, right[0]),
                strict=True,
            )
        ]
        return lax.concatenate(parts, result[1])

    return grouped


def side_by_side(form: Any) -> Any:
    """A form of grouped convolutions out of one of single ones, groups as a batch."""

    def grouped(lhs: jax.Array, rhs: jax.Array, conv: Convolution) -> jax.Array:
        axis, one = _single(conv)
        _, right, result = conv.params["dimension_numbers"]
        operands = (
            _batched(lhs, conv.groups, axis),
            _batched(rhs, conv.groups, right[0]),
        )
        out = jax.vmap(
            lambda x, w: form(x, w, one), in_axes=(axis, right[0]), out_axes=result[1]
        )(*operands)
        shape = list(out.shape)
        shape[result[1] : result[1] + 2] = [conv.groups * conv.out_channels]
        return lax.reshape(out, shape)

    return grouped


def _single(conv: Convolution) -> tuple[int, Convolution]:
    """The axis of the left operand that holds the groups, and one group alone."""
    left = conv.params["dimension_numbers"][0]
    axis = left[1] if conv.params["feature_group_count"] > 1 else left[0]
    single = conv.params | {"feature_group_count": 1, "batch_group_count": 1}
    return axis, conv._replace(groups=1, params=single)


def _batched(x: jax.Array, groups: int, axis: int) -> jax.Array:
    shape = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
    return lax.reshape(x, shape)


def _split(x: jax.Array, groups: int, axis: int) -> list[jax.Array]:
    size = x.shape[axis] // groups
    return [
        lax.slice_in_dim(x, i * size, (i + 1) * size, axis=axis) for i in range(groups)
    ]


def _padded(lhs: jax.Array, conv: Convolution) -> jax.Array:
    left = conv.params["dimension_numbers"][0]
    amounts = [(0, 0, 0)] * lhs.ndim
    for axis, (low, high), dilation in zip(
        left[2:], conv.params["padding"], conv.params["lhs_dilation"], strict=True
    ):
        amounts[axis] = (low, high, dilation - 1)
    if not conv.is_padded:
        return lhs
    return lax.pad(lhs, jnp.zeros((), lhs.dtype), amounts)


def _pieces(x: jax.Array, conv: Convolution, *, axis: int) -> Any:
    """Per tap what all output points see, or per output point what all taps see."""
    strides, dilations = conv.params["window_strides"], conv.params["rhs_dilation"]
    fixed, running = (conv.taps, dilations), (conv.points, strides)
    if conv.is_kernel_gradient:
        fixed, running = running, fixed
    for index in itertools.product(*map(range, fixed[0])):
        window = tuple(
            slice(i * f, i * f + (size - 1) * r + 1, r)
            for i, f, size, r in zip(index, fixed[1], *running, strict=True)
        )
        yield index, x[(*(slice(None),) * axis, *window)]


def _dot(x: jax.Array, y: jax.Array, numbers: Any, conv: Convolution) -> jax.Array:
    return lax.dot_general(
        x,
        y,
        numbers,
        precision=conv.params["precision"],
        preferred_element_type=conv.params["preferred_element_type"],
    )


def _to_result(out: jax.Array, conv: Convolution, *, channel_axis: int) -> jax.Array:
    """From `(n, p, o)` or `(n, o, p)` to the order that the equation's output has."""
    result = conv.params["dimension_numbers"][2]
    first = 1 if channel_axis != 1 else 2
    ours = (0, channel_axis, *range(first, first + conv.num_dims))
    order = [0] * out.ndim
    for theirs, axis in zip(result, ours, strict=True):
        order[theirs] = axis
    return lax.transpose(out, order)
