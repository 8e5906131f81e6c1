"""Convolutions at full speed inside loops on a CPU.

XLA brings a convolution to the layout of its fast CPU kernels only in the entry of a
program (https://github.com/jax-ml/jax/issues/12868). In the body of a loop or a branch a
channels-first convolution, as equinox writes it, runs as a plain loop nest, up to 50
times slower. Here the finished update is rewritten instead of the model: convolutions
that suffer are written in a form that is fast anywhere.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from trainax_pk.engine._convolution_forms import read_convolution
from trainax_pk.engine._convolution_rule import choose_form
from trainax_pk.engine._jaxpr import replace_equations, walk_equations

_CONVOLUTION = "conv_general_dilated"


class LoopContents(NamedTuple):
    """What a program holds that is slower in a loop than outside, on a CPU.

    Attributes:
        convolutions: Number of convolution equations.
        loop_convolutions: How many of them lie in a loop or a branch.
        replaceable: How many `fast_convolutions` would replace.
        ffts: Number of Fourier transforms.
    """

    convolutions: int
    loop_convolutions: int
    replaceable: int
    ffts: int


def fast_convolutions(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Rewrites a function's convolutions so that they are fast inside loops on a CPU.

    To be applied last, around the finished update (after `jax.grad`, after `jax.vmap`):
    the forms are chosen by the sizes that the traced program has. The function is traced
    once; nothing but convolutions changes; loops, jit, checkpoint, branches, custom rules
    and shard_map are rewritten inside. Values change by rounding alone. The rule
    (`benchmarks/convolutions_in_loops.py`) leaves alone whatever is not expected to gain.

    Args:
        fn: Takes and returns PyTrees of arrays. Derivatives of the result are not
            supported where they pass through leftover `jax.custom_vjp` rules: those keep
            their backward pass as written.

    Returns:
        A function of the same signature, dtypes, shapes and weak types.

    Raises:
        TypeError: If `fn` is not callable.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from trainax_pk.engine import fast_convolutions
        >>> kernel = jnp.ones((32, 32, 3)) / 96
        >>> def smooth(u):
        ...     step = lambda u, _: (
        ...         jax.lax.conv_general_dilated(u, kernel, (1,), "SAME"), None
        ...     )
        ...     return jax.lax.scan(step, u, length=5)[0]
        >>> u = jnp.ones((20, 32, 160))
        >>> bool(jnp.allclose(fast_convolutions(smooth)(u), smooth(u)))
        True
    """
    if not callable(fn):
        raise TypeError(
            f"Expected a function to rewrite, got {type(fn).__name__}. Pass the update "
            "itself, not its result."
        )

    @wraps(fn)
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        run = jex.jaxpr_as_fun(replace_equations(jaxpr, _replacement))
        out = run(*jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return rewritten


def inspect_loops(jaxpr: Any) -> LoopContents:
    """Counts what a traced program holds of operations that loops slow down on a CPU.

    Args:
        jaxpr: As `jax.make_jaxpr` returns it.

    Returns:
        The counts.

    Raises:
        TypeError: If it is no jaxpr.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from trainax_pk.engine import inspect_loops
        >>> def smooth(u, kernel):
        ...     return jax.lax.conv_general_dilated(u, kernel, (1,), "SAME")
        >>> jaxpr = jax.make_jaxpr(smooth)(jnp.ones((20, 1, 30)), jnp.ones((1, 1, 3)))
        >>> inspect_loops(jaxpr)
        LoopContents(convolutions=1, loop_convolutions=0, replaceable=0, ffts=0)
    """
    if not isinstance(jaxpr, jex.Jaxpr | jex.ClosedJaxpr):
        raise TypeError(
            f"Expected a jaxpr, got {type(jaxpr).__name__}. Pass "
            "jax.make_jaxpr(fn)(*args)."
        )
    convolutions = inside = replaceable = ffts = 0
    for eqn, in_loop in walk_equations(jaxpr):
        if eqn.primitive.name == _CONVOLUTION:
            convolutions += 1
            inside += in_loop
            replaceable += choose_form(read_convolution(eqn)) is not None
        ffts += eqn.primitive.name == "fft"
    return LoopContents(convolutions, inside, replaceable, ffts)


def has_loop_convolutions(jaxpr: Any) -> bool:
    """Whether a traced program holds convolutions in loops or branches.

    Args:
        jaxpr: As `jax.make_jaxpr` returns it.

    Returns:
        True if there are any, replaceable or not.

    Raises:
        TypeError: If it is no jaxpr.

    Example:
        >>> import jax
        >>> from trainax_pk.engine import has_loop_convolutions
        >>> has_loop_convolutions(jax.make_jaxpr(lambda x: x + 1)(0.0))
        False
    """
    return inspect_loops(jaxpr).loop_convolutions > 0


def platform_needs_it(platform: str) -> bool:
    """Whether a backend slows convolutions down inside loops.

    Args:
        platform: As `jax.default_backend()` names it.

    Returns:
        True for "cpu" alone. GPU and TPU compilers choose layouts everywhere.

    Raises:
        TypeError: If it is no name.

    Example:
        >>> from trainax_pk.engine import platform_needs_it
        >>> platform_needs_it("cpu"), platform_needs_it("gpu")
        (True, False)
    """
    if not isinstance(platform, str):
        raise TypeError(
            f"Expected the name of a platform, got {type(platform).__name__}. Pass "
            "jax.default_backend() or device.platform."
        )
    return platform == "cpu"


def _replacement(eqn: Any) -> Callable[..., Any] | None:
    if eqn.primitive.name != _CONVOLUTION:
        return None
    conv = read_convolution(eqn)
    form = choose_form(conv)
    if form is None:
        return None
    return lambda lhs, rhs: form(lhs, rhs, conv)
