"""Which form of a convolution is fastest inside a loop on a CPU, by its sizes.

The times are microseconds as measured on two cores of an x86-64 server
(`benchmarks/convolutions_in_loops.py`), fitted by hand. Only ratios matter: a form is
taken when it promises to beat the plain convolution by a margin that covers the scatter
of the fit.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from trainax_pk.engine._convolution_forms import (
    Convolution,
    channels_last,
    group_after_group,
    one_by_one,
    shift_and_add,
    side_by_side,
    tap_products,
)

Form = Callable[..., Any]

_MARGIN = 1.2
# Groups beyond this stay one equation, lest a vmapped ensemble blow up the program.
_MOST_GROUPS = 16
_GROUPED_SLOWDOWN = 4
# So few terms (input channels times taps) the compiler keeps in registers: nothing beats
# a plain loop nest over them, if no border has to be tested.
_FEW_TERMS = 16
# A gradient by a kernel of fewer pairs of channels is faster as one matrix product per
# tap, of operands that are not transposed for it (`_transposes.py`).
_FEW_CHANNELS = 32 * 32
_MOST_TAPS = 27


def choose_form(conv: Convolution) -> Form | None:
    """The form to put in place of a convolution, or None to leave it.

    Args:
        conv: What to compute. Only real single and double precision are ever replaced:
            nothing else has been measured.

    Returns:
        `(lhs, rhs, conv) -> out`, or None.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from trainax_pk.engine._convolution_forms import read_convolution
        >>> from trainax_pk.engine._convolution_rule import choose_form
        >>> def conv(x, w):
        ...     return jax.lax.conv_general_dilated(x, w, (1,), "VALID")
        >>> wide = jax.make_jaxpr(conv)(jnp.ones((20, 32, 162)), jnp.ones((32, 32, 3)))
        >>> choose_form(read_convolution(wide.jaxpr.eqns[-1])).__name__
        'channels_last'
        >>> thin = jax.make_jaxpr(conv)(jnp.ones((20, 1, 162)), jnp.ones((32, 1, 3)))
        >>> choose_form(read_convolution(thin.jaxpr.eqns[-1])) is None
        True
    """
    if not _is_supported(conv):
        return None
    # Where XLA has a fast kernel, nothing but very thin convolutions gains from others.
    grouped = conv.groups > 1
    promises = (
        {channels_last: _channels_last}
        if _has_kernel(conv)
        else {tap_products: _tap_products}
    )
    if grouped and conv.is_kernel_gradient and _num_pieces(conv) <= _MOST_TAPS:
        promises[tap_products] = _tap_products
    if not conv.is_kernel_gradient:
        terms = conv.in_channels * math.prod(conv.taps)
        if (conv.is_padded or grouped) and terms <= _FEW_TERMS:
            promises[shift_and_add] = _shift_and_add
        if _is_pointwise(conv):
            promises[one_by_one] = _one_by_one
    times = {form: promise(conv) for form, promise in promises.items()}
    best = min(times, key=times.__getitem__)
    if times[best] * _MARGIN >= _plain(conv):
        return None
    if not grouped:
        return tap_products if best is channels_last and _is_thin(conv) else best
    if best is not channels_last:
        return side_by_side(best)
    if conv.groups <= _MOST_GROUPS:
        return group_after_group(best)
    # XLA keeps the fast kernels for grouped channels-last convolutions, at a fraction of
    # their speed.
    return best if times[best] * _GROUPED_SLOWDOWN < _plain(conv) else None


def _is_thin(conv: Convolution) -> bool:
    """Whether it is a gradient by a small kernel of few channels, in one dimension."""
    small = conv.num_dims == 1 and math.prod(conv.points) <= _MOST_TAPS
    few = conv.batch * conv.out_channels < _FEW_CHANNELS
    return conv.is_kernel_gradient and small and few


def _is_supported(conv: Convolution) -> bool:
    sizes = (conv.batch, conv.in_channels, conv.out_channels, *conv.taps, *conv.points)
    static = all(isinstance(size, int) and size > 0 for size in sizes)
    kept = conv.params["preferred_element_type"] in (None, conv.dtype)
    known = conv.dtype in (jnp.float32, jnp.float64) and 1 <= conv.num_dims <= 3
    shardless = conv.params.get("out_sharding") is None
    return static and kept and known and shardless and not _is_fast_already(conv)


def _is_fast_already(conv: Convolution) -> bool:
    num = conv.num_dims
    space = tuple(range(1, num + 1))
    left, right, result = conv.params["dimension_numbers"]
    canonical = left == result == (0, num + 1, *space)
    last = canonical and right == (num + 1, num, *range(num))
    return last and _has_kernel(conv)


def _has_kernel(conv: Convolution) -> bool:
    """Whether XLA has a fast CPU kernel at all, for the channels-last layout."""
    return conv.dtype == jnp.float32 and conv.num_dims <= 2


def _is_pointwise(conv: Convolution) -> bool:
    strides = conv.params["window_strides"]
    return (
        math.prod(conv.taps) == 1
        and not conv.is_padded
        and all(stride == 1 for stride in strides)
    )


def _plain(conv: Convolution) -> float:
    """A loop nest that LLVM vectorises well or badly, as the innermost loop allows.

    Rates are those inside a whole network. A convolution alone in a loop can be several
    times faster: there its operands come in the order that its loop nest wants.
    """
    terms = conv.in_channels * math.prod(conv.taps)
    flat = conv.num_dims == 1
    if conv.is_kernel_gradient:
        rate = 0.35 if flat else 0.6
    elif conv.is_padded:
        # A test against the border in the innermost loop.
        rate = 0.33 if flat else min(0.9, 0.3 + 0.0045 * terms)
    elif terms <= _FEW_TERMS:
        rate = 0.02 + 0.0012 * terms
    else:
        rate = 0.3
    # Groups lie between other axes than members do: operands and result are copied.
    copies = 0.35 * _entries(conv) if conv.groups > 1 else 0.0
    return conv.groups * (conv.multiply_adds * rate + copies) * 1e-3


def _channels_last(conv: Convolution) -> float:
    rate = 0.05 if conv.is_kernel_gradient and conv.num_dims == 2 else 0.025
    start = 15.0 if conv.num_dims == 1 else 30.0
    one = start + (rate * conv.multiply_adds + 0.35 * _entries(conv)) * 1e-3
    return conv.groups * one


def _tap_products(conv: Convolution) -> float:
    rate = 0.08 if conv.num_dims == 1 else 0.15
    scalar = conv.is_kernel_gradient and conv.batch * conv.out_channels == 1
    start = 2.0 if scalar else 8.0
    return start + rate * conv.groups * conv.multiply_adds * 1e-3


def _shift_and_add(conv: Convolution) -> float:
    return 2.0 + 0.08 * conv.groups * conv.multiply_adds * 1e-3


def _one_by_one(conv: Convolution) -> float:
    return 10.0 + 0.03 * conv.groups * conv.multiply_adds * 1e-3


def _num_pieces(conv: Convolution) -> int:
    return math.prod(conv.points if conv.is_kernel_gradient else conv.taps)


def _entries(conv: Convolution) -> int:
    """Numbers that are transposed, on the way in and out."""
    large = conv.taps if conv.is_kernel_gradient else conv.points
    width = conv.batch if conv.is_kernel_gradient else conv.out_channels
    rows = conv.in_channels if conv.is_kernel_gradient else conv.batch
    partner = conv.out_channels if conv.is_kernel_gradient else conv.in_channels
    return math.prod(large) * rows * (width + partner)
