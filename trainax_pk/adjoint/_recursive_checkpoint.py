"""Reverse mode that stores few states and recomputes the rest."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from trainax_pk._tree import as_int, check_count
from trainax_pk.adjoint._base import AbstractAdjoint, settled_carry

Body = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class RecursiveCheckpointAdjoint(AbstractAdjoint):
    """Exact gradients from stored states, with the inside of the steps recomputed.

    Without `checkpoints`, each of the T states is stored and one step at a time is
    recomputed: backward memory is T states plus the intermediates of one step, compute
    is one more forward pass. For a network the states are a few percent of the
    intermediates, and fewer writes to memory often pay for the recomputation.

    With `checkpoints=c`, at most c states are stored at once: scans nested L deep, L as
    small as c allows, of n₁ · … · n_L >= T steps with n₁ + … + n_L <= c. Memory is
    O(L·T^(1/L)), from O(√T) for L = 2 down to O(log T); compute is L more forward
    passes. (Nested scans rather than the treeverse schedule of Griewank & Walther,
    2000, doi:10.1145/347837.347846: the same orders, a program of constant size, and it
    composes with forward mode and higher derivatives.) A length T that has no such
    factors is rounded up; the steps in excess are skipped, at the price of a test per
    step.

    A solve that stops by itself is checkpointed online (Stumm & Walther 2010,
    doi:10.1137/080742439), as by `optimistix.RecursiveCheckpointAdjoint`; None then is
    about the square root of twice `max_steps`.

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

    checkpoints: int | None = eqx.field(default=None, converter=as_int)

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
        if self.checkpoints is None or length <= self.checkpoints:
            return _nested_scan(body, init, xs, (length,))
        factors = _factors(length, self.checkpoints)
        excess = math.prod(factors) - length
        if excess == 0:
            return _nested_scan(body, init, xs, factors)
        init = settled_carry(body, init, xs, length)
        padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:excess]]), xs)
        steps = jnp.arange(length + excess, dtype=jnp.int32)
        last, ys = _nested_scan(_within(body, length), init, (steps, padded), factors)
        return last, jax.tree.map(lambda y: y[:length], ys)

    def while_loop(
        self,
        cond_fun: Callable[[PyTree], Any],
        body_fun: Callable[[PyTree], PyTree],
        init: PyTree[Any],
        *,
        max_steps: int | None,
    ) -> PyTree[Any]:
        """The checkpointed loop that optimistix uses.

        Raises:
            ValueError: Neither `max_steps` nor `checkpoints` is given.
        """
        if max_steps is None and self.checkpoints is None:
            raise ValueError(
                "Expected a bound on what is stored, got neither `max_steps` nor "
                "`checkpoints`. Pass `max_steps`, or "
                "RecursiveCheckpointAdjoint(checkpoints)."
            )
        if max_steps == 0:
            return init
        return eqxi.while_loop(
            cond_fun,
            body_fun,
            init,
            max_steps=max_steps,
            kind="checkpointed",
            checkpoints=self.checkpoints,
        )


def _factors(length: int, checkpoints: int) -> tuple[int, ...]:
    """Lengths of the nested scans: few of them, then no excess, then a small sum."""
    fewest = length
    for depth in range(2, math.ceil(math.log2(length)) + 1):
        exact = min(_divided(length, depth), key=sum, default=())
        if exact and sum(exact) <= checkpoints:
            return exact
        rounded = _rounded_up(length, depth)
        if sum(rounded) <= checkpoints:
            return rounded
        fewest = min(fewest, sum(rounded))
    raise ValueError(
        f"Expected at least {fewest} checkpoints for a loop of {length} steps, got "
        f"{checkpoints}. Pass a larger `checkpoints`, or None to store every state."
    )


def _divided(length: int, depth: int) -> Iterator[tuple[int, ...]]:
    """Factorisations into `depth` factors > 1, the greatest first."""
    if depth == 1:
        yield (length,)
        return
    for factor in range(2, math.isqrt(length) + 1):
        if length % factor == 0:
            for others in _divided(length // factor, depth - 1):
                if others[-1] >= factor:
                    yield (*others, factor)


def _rounded_up(length: int, depth: int) -> tuple[int, ...]:
    """The `depth` factors of smallest sum whose product is at least `length`."""
    low = math.floor(length ** (1 / depth))
    # The root is rounded: 1000 ** (1 / 3) is 9.99....
    low = low + 1 if (low + 1) ** depth <= length else low
    for raised in itertools.count():
        factors = (low + 1,) * raised + (low,) * (depth - raised)
        if math.prod(factors) >= length:
            return factors
    raise AssertionError


def _nested_scan(
    body: Body, init: PyTree[Any], xs: PyTree[Any], factors: tuple[int, ...]
) -> tuple[PyTree[Any], PyTree[Any]]:
    # Inside a scan nothing can be merged across iterations, so that the barriers
    # against common-subexpression elimination would only cost time.
    count, *inner = factors
    if not inner:
        return jax.lax.scan(
            jax.checkpoint(body, prevent_cse=False), init, xs, length=count
        )

    def run_segment(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        return _nested_scan(body, carry, x, tuple(inner))

    segments = jax.tree.map(
        lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), xs
    )
    last, ys = jax.lax.scan(
        jax.checkpoint(run_segment, prevent_cse=False), init, segments, length=count
    )
    return last, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


def _within(body: Body, length: int) -> Body:
    """The body for the first `length` steps, nothing for the others."""

    def guarded(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        def skip(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            shapes = jax.eval_shape(body, carry, x)[1]
            return carry, jax.tree.map(jnp.zeros_like, shapes)

        t, x = x
        return jax.lax.cond(t < length, body, skip, carry, x)

    return guarded
