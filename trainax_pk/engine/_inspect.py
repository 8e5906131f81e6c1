"""What an update consists of, read off its jaxpr."""

import math
from typing import Any, NamedTuple


class Work(NamedTuple):
    """Counts over an update, loops multiplied out.

    Attributes:
        multiply_adds: Of matrix products and convolutions.
        convolutions: Whether there are any.
        ffts: Whether there are any.
    """

    multiply_adds: int
    convolutions: bool
    ffts: bool


def inspect_work(jaxpr: Any) -> Work:
    """Counts the work of a closed jaxpr.

    Args:
        jaxpr: As `jax.make_jaxpr` returns it.

    Returns:
        The counts. Bodies of while loops count once, of scans as often as they run.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.engine import inspect_work
        >>> product = jax.make_jaxpr(lambda a, b: a @ b)
        >>> inspect_work(product(jnp.ones((2, 3)), jnp.ones((3, 4)))).multiply_adds
        24
    """
    return _walk(getattr(jaxpr, "jaxpr", jaxpr))


def _walk(jaxpr: Any) -> Work:
    macs, convolutions, ffts = 0, False, False
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        times = eqn.params["length"] if name == "scan" else 1
        if name == "dot_general":
            macs += _dot(eqn)
        elif name == "conv_general_dilated":
            macs += _convolution(eqn)
            convolutions = True
        ffts = ffts or name == "fft"
        for inner in _inner(eqn.params):
            work = _walk(inner)
            macs += times * work.multiply_adds
            convolutions = convolutions or work.convolutions
            ffts = ffts or work.ffts
    return Work(macs, convolutions, ffts)


def _inner(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _convolution(eqn: Any) -> int:
    spec = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    per_output = math.prod(kernel[i] for i in spec[1:])
    return math.prod(eqn.outvars[0].aval.shape) * per_output
