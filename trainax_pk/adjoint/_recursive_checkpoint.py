"""Reverse mode that stores few states and recomputes the rest."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from trainax_pk._tree import check_count
from trainax_pk.adjoint._base import AbstractAdjoint

Body = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class RecursiveCheckpointAdjoint(AbstractAdjoint):
    """Exact gradients from stored states, with the inside of the steps recomputed.

    Without `checkpoints`, each of the T states is stored and one step at a time is
    recomputed: backward memory is T states plus the intermediates of one step, compute
    is one more forward pass. For a network the states are a few percent of the
    intermediates, and fewer writes to memory often pay for the recomputation.

    With `checkpoints=c`, at most c states are stored at once: scans nested L deep, L as
    small as c allows. Memory is O(L·T^(1/L)), from O(√T) for L = 2 down to O(log T);
    compute is L more forward passes. (Nested scans rather than the treeverse schedule
    of Griewank & Walther, 2000, doi:10.1145/347837.347846: the same orders, a program
    of constant size, and it composes with forward mode and higher derivatives.)

    Attributes:
        checkpoints: The most states held at once, or None for all T.

    Raises:
        ValueError: `checkpoints` is no integer >= 1, or too few for the loop's length.

    Example:
        >>> import jax
        >>> from trainax_pk import RecursiveCheckpointAdjoint
        >>> adjoint = RecursiveCheckpointAdjoint(checkpoints=8)
        >>> halve = lambda u, _: (u / 2, u)
        >>> jax.grad(lambda u: adjoint.scan(halve, u, None, 10)[0])(1024.0)
        Array(0.00097656, dtype=..., weak_type=True)
    """

    checkpoints: int | None = None

    def __check_init__(self) -> None:
        if self.checkpoints is not None:
            check_count("checkpoints", self.checkpoints)

    def scan(
        self,
        body: Body,
        init: PyTree[Any],
        xs: PyTree[Any],
        length: int,
    ) -> tuple[PyTree[Any], PyTree[Any]]:
        """As `jax.lax.scan`, storing at most `checkpoints` states for the gradient."""
        depth = _depth(length, self.checkpoints)
        return _nested_scan(body, init, xs, length, depth)


def _segment(length: int, depth: int) -> int:
    """Steps in each segment of the outermost of `depth` nested scans."""
    return max(1, math.ceil(length ** ((depth - 1) / depth)))


def _stored(length: int, depth: int) -> int:
    """States held at once by `_nested_scan`: of this level, and of the open segment."""
    if depth == 1 or length <= 1:
        return length
    segment = _segment(length, depth)
    count, rest = divmod(length, segment)
    inside = max(_stored(segment, depth - 1), _stored(rest, depth - 1))
    return count + inside


def _depth(length: int, checkpoints: int | None) -> int:
    if checkpoints is None or length <= checkpoints:
        return 1
    deepest = max(2, math.ceil(math.log2(length)) + 1)
    for depth in range(2, deepest + 1):
        if _stored(length, depth) <= checkpoints:
            return depth
    fewest = min(_stored(length, depth) for depth in range(1, deepest + 1))
    raise ValueError(
        f"Expected at least {fewest} checkpoints for a loop of {length} steps, got "
        f"{checkpoints}. Pass a larger `checkpoints`, or None to store every state."
    )


def _nested_scan(
    body: Body, init: PyTree[Any], xs: PyTree[Any], length: int, depth: int
) -> tuple[PyTree[Any], PyTree[Any]]:
    # Inside a scan nothing can be merged across iterations, so that the barriers
    # against common-subexpression elimination would only cost time.
    if depth == 1 or length <= 1:
        return jax.lax.scan(
            jax.checkpoint(body, prevent_cse=False), init, xs, length=length
        )
    segment = _segment(length, depth)
    count, rest = divmod(length, segment)
    head = jax.tree.map(
        lambda x: x[: count * segment].reshape(count, segment, *x.shape[1:]), xs
    )

    def run_segment(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        return _nested_scan(body, carry, x, segment, depth - 1)

    carry, ys = jax.lax.scan(
        jax.checkpoint(run_segment, prevent_cse=False), init, head, length=count
    )
    ys = jax.tree.map(lambda y: y.reshape(count * segment, *y.shape[2:]), ys)
    if rest == 0:
        return carry, ys
    tail = jax.tree.map(lambda x: x[count * segment :], xs)
    carry, last = _nested_scan(body, carry, tail, rest, depth - 1)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, last)
