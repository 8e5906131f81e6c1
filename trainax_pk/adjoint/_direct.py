"""Plain reverse mode: store everything."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from trainax_pk.adjoint._base import AbstractAdjoint, bounded_while_loop


class DirectAdjoint(AbstractAdjoint):
    """Reverse mode through a plain scan: every intermediate of every step is stored.

    Memory of the backward pass is O(T) times the intermediates of one step; compute is
    one forward and one backward pass. In a solve that stops by itself T is `max_steps`,
    which therefore must be given, and should not be much more than what is needed.

    Example:
        >>> import jax
        >>> from trainax_pk import DirectAdjoint
        >>> halve = lambda u, _: (u / 2, u)
        >>> jax.grad(lambda u: DirectAdjoint().scan(halve, u, None, 3)[0])(1.0)
        Array(0.125, dtype=..., weak_type=True)
    """

    def scan(
        self,
        body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
        init: PyTree[Any],
        xs: PyTree[Any],
        length: int,
    ) -> tuple[PyTree[Any], PyTree[Any]]:
        """As `jax.lax.scan`."""
        return jax.lax.scan(body, init, xs, length=length)

    def while_loop(
        self,
        cond_fun: Callable[[PyTree], Any],
        body_fun: Callable[[PyTree], PyTree],
        init: PyTree[Any],
        *,
        max_steps: int | None,
    ) -> PyTree[Any]:
        """A scan of `max_steps` steps, idle once the condition fails.

        Raises:
            ValueError: `max_steps` is None.
        """
        return bounded_while_loop(
            self.scan, cond_fun, body_fun, init, max_steps=max_steps
        )
