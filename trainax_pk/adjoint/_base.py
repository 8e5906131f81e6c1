"""What an adjoint is."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
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
