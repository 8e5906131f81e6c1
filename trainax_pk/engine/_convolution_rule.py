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
import numpy as np

from trainax_pk.engine._convolution_forms import (
    Convolution,
    channels_last,
    one_by_one,
    per_group,
    shift_and_add,
    tap_products,
)

Form = Callable[..., Any]

_MARGIN = 1.3
# More terms than this unroll into programs that compile slowly.
_MOST_TERMS = 64
# Groups beyond this stay one equation, lest a vmapped ensemble blow up the program.
_MOST_GROUPS = 16
# Below this width the packing that fast kernels do first costs more than it earns.
_FEWEST_CHANNELS = 4


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
    promises = {channels_last: _channels_last, tap_products: _tap_products}
    if not conv.is_kernel_gradient:
        terms = conv.in_channels * math.prod(conv.taps)
        if conv.is_padded and terms <= _MOST_TERMS:
            promises[shift_and_add] = _shift_and_add
        if _is_pointwise(conv):
            promises[one_by_one] = _one_by_one
    times = {form: promise(conv) for form, promise in promises.items()}
    best = min(times, key=times.__getitem__)
    if times[best] * _MARGIN >= _plain(conv):
        return None
    if conv.groups == 1:
        return best
    if conv.groups <= _MOST_GROUPS:
        return per_group(best)
    # XLA keeps the fast kernels for grouped channels-last convolutions, at a fraction of
    # their speed.
    return channels_last if times[channels_last] * 4 < _plain(conv) else None


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
    """A loop nest that LLVM vectorises well or badly, as the innermost loop allows."""
    terms = conv.in_channels * math.prod(conv.taps)
    flat = conv.num_dims == 1
    double = conv.dtype == jnp.float64
    if conv.is_padded and not conv.is_kernel_gradient:
        # A test against the border in the innermost loop.
        rate = 0.18 if flat else min(0.9, 0.3 + 0.0045 * terms)
    elif conv.is_kernel_gradient:
        rate = {1: 0.08, 2: 0.15, 3: 0.5}[conv.num_dims] * (2.0 if double else 1.0)
    elif flat or terms < 128:
        rate = min(0.4, 0.02 + 0.0012 * terms)
    else:
        rate = 0.6 if terms < 256 else 0.25
    return conv.multiply_adds * rate * 1e-3


def _channels_last(conv: Convolution) -> float:
    narrow = min(conv.in_channels, conv.out_channels, conv.batch) < _FEWEST_CHANNELS
    if not _has_kernel(conv) or (narrow and conv.is_kernel_gradient):
        return np.inf
    rate = 0.05 if conv.is_kernel_gradient and conv.num_dims == 2 else 0.025
    start = 15.0 if conv.num_dims == 1 else 30.0
    return start + (rate * _effective(conv) + 0.35 * _entries(conv)) * 1e-3


def _tap_products(conv: Convolution) -> float:
    narrow = min(conv.in_channels, conv.out_channels, conv.batch) < _FEWEST_CHANNELS
    if narrow and conv.is_kernel_gradient:
        return np.inf
    rate = 0.08 if conv.num_dims == 1 else 0.15
    return 15.0 + rate * _effective(conv) * 1e-3


def _shift_and_add(conv: Convolution) -> float:
    return 2.0 + 0.08 * conv.multiply_adds * 1e-3


def _one_by_one(conv: Convolution) -> float:
    return 10.0 + 0.03 * conv.multiply_adds * 1e-3


def _effective(conv: Convolution) -> int:
    """Multiply-adds as a blocked matrix product counts them: thin ones cost as wide."""
    outer = conv.batch * math.prod(conv.points)
    depth = conv.in_channels * math.prod(conv.taps)
    return outer * max(conv.out_channels, 16) * max(depth, 16)


def _entries(conv: Convolution) -> int:
    """Numbers that are transposed, on the way in and out."""
    large = conv.taps if conv.is_kernel_gradient else conv.points
    width = conv.batch if conv.is_kernel_gradient else conv.out_channels
    rows = conv.in_channels if conv.is_kernel_gradient else conv.batch
    partner = conv.out_channels if conv.is_kernel_gradient else conv.in_channels
    return math.prod(large) * rows * (width + partner)
