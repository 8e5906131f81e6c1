"""What an adjoint is."""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import PyTree


class AbstractAdjoint(optimistix.AbstractAdjoint):
    """How cotangents flow through a loop: what is stored, recomputed or cut.

    An adjoint is given the computation and knows neither model nor objective. It
    never changes the forward value. It is an `optimistix.AbstractAdjoint` as well, so
    that `optimistix.fixed_point`, `root_find`, `least_squares` and `minimise` take it.

    To add one: subclass, declare its options as fields, check them in
    `__check_init__`, and implement `scan` so that its value equals that of
    `jax.lax.scan`, and `while_loop` for loops that end by themselves
    (`bounded_while_loop(self.scan, ...)` makes one of the other). Then add a row to the
    table in `tests/test_adjoint.py`; the contract tests (value, gradient, jit, vmap,
    program size) run on every row.
    """

    @abc.abstractmethod
    def scan(
        self,
        body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
        init: PyTree[Any],
        xs: PyTree[Any],
        length: int,
    ) -> tuple[PyTree[Any], PyTree[Any]]:
        """Value of `jax.lax.scan(body, init, xs, length)`, differentiated its way.

        Args:
            body: `(carry, x) -> (carry, y)`; may close over arrays.
            init: First carry.
            xs: Leaves `(length, ...)`, or None.
            length: Number of steps, static.

        Returns:
            The last carry, and the `y` stacked along a leading axis.
        """

    @abc.abstractmethod
    def while_loop(
        self,
        cond_fun: Callable[[PyTree], Any],
        body_fun: Callable[[PyTree], PyTree],
        init: PyTree[Any],
        *,
        max_steps: int | None,
    ) -> PyTree[Any]:
        """Value of `jax.lax.while_loop(cond_fun, body_fun, init)`, with its gradient.

        Args:
            cond_fun: Whether to go on, from a carry.
            body_fun: The next carry; may close over arrays.
            init: First carry.
            max_steps: The most steps that are taken, static, or None for no bound.

        Returns:
            The last carry.
        """

    def apply(
        self,
        primal_fn: Callable[[PyTree], PyTree],
        rewrite_fn: Callable[..., PyTree],
        inputs: PyTree[Any],
        tags: frozenset[object],
    ) -> PyTree[Any]:
        """Runs a solve of optimistix, which asks for its loop.

        Args:
            primal_fn: The solve, given its inputs and a `while_loop`.
            rewrite_fn: The equation that holds at the solution; implicit adjoints
                alone need it.
            inputs: What the solve works on.
            tags: Properties of the solution's Jacobian; implicit adjoints alone need
                them.

        Returns:
            What `primal_fn` returns.
        """
        del rewrite_fn, tags
        return primal_fn((*inputs, self.while_loop))


def bounded_while_loop(
    scan: Callable[..., tuple[PyTree, PyTree]],
    cond_fun: Callable[[PyTree], Any],
    body_fun: Callable[[PyTree], PyTree],
    init: PyTree[Any],
    *,
    max_steps: int | None,
) -> PyTree[Any]:
    """A while loop made of a scan of `max_steps` steps, idle once the condition fails.

    Idle steps cost a test each, except under `jax.vmap`, where all steps are computed
    for all members: keep `max_steps` close to what is needed.

    Args:
        scan: `scan` of an adjoint, or `jax.lax.scan`.
        cond_fun: Whether to go on, from a carry.
        body_fun: The next carry.
        init: First carry.
        max_steps: Length of the scan.

    Returns:
        The last carry.

    Raises:
        ValueError: `max_steps` is None.

    Example:
        >>> import jax
        >>> from trainax_pk.adjoint import DirectAdjoint, bounded_while_loop
        >>> def halve_to_one(x):
        ...     return bounded_while_loop(
        ...         DirectAdjoint().scan, lambda x: x > 1, lambda x: x / 2, x, max_steps=9
        ...     )
        >>> jax.value_and_grad(halve_to_one)(12.0)
        (Array(0.75, dtype=float32...), Array(0.0625, dtype=float32...))
    """
    if max_steps is None:
        raise ValueError(
            "Expected a bound on the number of steps, got max_steps=None: every step's "
            "intermediates are stored. Pass `max_steps`, or "
            "RecursiveCheckpointAdjoint(checkpoints), which needs none."
        )

    def step(carry: PyTree, _: None) -> tuple[PyTree, None]:
        return jax.lax.cond(cond_fun(carry), body_fun, lambda c: c, carry), None

    init = settled_carry(lambda c, _: (body_fun(c), None), init, None, 1)
    return scan(step, init, None, max_steps)[0]


def settled_carry(
    body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    init: PyTree[Any],
    xs: PyTree[Any],
    length: int,
) -> PyTree[Any]:
    """The first carry in the types that `jax.lax.scan` would settle on.

    A weakly typed carry takes the type that the body returns; an adjoint that traces
    the body more than once has to know it beforehand. What scan refuses is refused
    here, by scan.
    """
    last, _ = jax.eval_shape(
        lambda init, xs: jax.lax.scan(body, init, xs, length=length), init, xs
    )
    return jax.tree.map(_with_dtype, init, last)


def _with_dtype(x: Any, like: Any) -> Any:
    x = jnp.asarray(x)
    return x if x.dtype == like.dtype else x.astype(like.dtype)
