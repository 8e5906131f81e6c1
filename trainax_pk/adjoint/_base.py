"""What an adjoint is."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


class AbstractAdjoint(eqx.Module):
    """How cotangents flow through a loop: what is stored, recomputed or cut.

    An adjoint is given the computation and knows neither model nor objective. It
    never changes the forward value.

    To add one: subclass, declare its options as fields, check them in
    `__check_init__`, and implement `scan` so that its value equals that of
    `jax.lax.scan`. Then add a row to the table in `tests/test_adjoint.py`; the contract
    tests (value, gradient, jit, vmap, program size) run on every row.
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
