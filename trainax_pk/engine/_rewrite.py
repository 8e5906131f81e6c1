"""What a backend needs done to an update before it is compiled."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.extend import core as jex

from trainax_pk.engine._fast_convolutions import fast_convolutions, platform_needs_it
from trainax_pk.engine._inspect import inspect_work
from trainax_pk.engine._transposes import put_off_transposes

Transformation = Callable[[Callable[..., Any]], Callable[..., Any]]

# Measured on 2 CPU cores with the linear convolution (benchmarks/engine.py): a step of a
# tiny body in a loop costs 1.8 µs more than unrolled, and 0.15 s more to compile.
_SAVED_PER_STEP = 1.8e-6
_COMPILE_PER_STEP = 0.15
_TINY_BODY = 50_000
_LONGEST = 32


def make_rewrite(platform: str, num_updates: int) -> Transformation:
    """The transformation of a finished update for a platform.

    On a CPU, convolutions are written so that loops do not slow them down, with what
    lies between them in the same order of axes, and short loops over time whose body is
    almost nothing are unrolled if the run is long enough to earn the compilation back.
    Elsewhere nothing is done.

    Args:
        platform: As `jax.default_backend()` names it.
        num_updates: Number of updates that lie ahead.

    Returns:
        A transformation of functions of arrays.

    Example:
        >>> from trainax_pk.engine import make_rewrite
        >>> make_rewrite("gpu", 1000)(abs) is abs
        True
    """
    if not platform_needs_it(platform):
        return lambda fn: fn
    if num_updates * _SAVED_PER_STEP < _COMPILE_PER_STEP:
        return lambda fn: put_off_transposes(fast_convolutions(fn))
    return lambda fn: put_off_transposes(fast_convolutions(_unrolled(fn)))


def _unrolled(fn: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(fn)
    def rewritten(*args: Any) -> Any:
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        out = jex.jaxpr_as_fun(_unroll(jaxpr))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return rewritten


def _unroll(jaxpr: Any) -> Any:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    eqns = [_unroll_equation(eqn) for eqn in inner.eqns]
    new = inner.replace(eqns=eqns)
    return new if inner is jaxpr else jaxpr.replace(jaxpr=new)


def _unroll_equation(eqn: Any) -> Any:
    if eqn.primitive.name == "scan":
        length, body = eqn.params["length"], eqn.params["jaxpr"]
        work = inspect_work(body)
        small = work.multiply_adds <= _TINY_BODY and not work.ffts
        if small and length <= _LONGEST:
            return eqn.replace(params={**eqn.params, "unroll": length})
        return eqn
    params = {
        name: _unroll(value)
        if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)
        else value
        for name, value in eqn.params.items()
    }
    return eqn.replace(params=params)
