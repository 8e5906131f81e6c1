"""The same map applied again and again, differentiated as an adjoint says."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from trainax_pk._tree import check_count
from trainax_pk.adjoint._base import AbstractAdjoint, settled_carry
from trainax_pk.adjoint._k_step import KStepAdjoint
from trainax_pk.adjoint._specs import to_rollout_adjoint

Body = Callable[[PyTree[Any]], PyTree[Any]]


def iterate(
    adjoint: Any, body: Body, init: PyTree[Array], length: int
) -> PyTree[Array]:
    """The last of x₀ = init, x_{n+1} = body(x_n), n < `length`.

    The adjoint changes the gradient and its memory, never the value: all run the same
    steps. `DirectAdjoint` and `RecursiveCheckpointAdjoint` differentiate all of them.
    `KStepAdjoint(k)` takes `length - k` steps without gradient, then k that have one
    (Bolte, Pauwels & Vaiter 2023, arXiv:2305.13768): memory is that of k steps
    whatever `length` is, and so is the work of the backward pass. Where the map
    contracts with spectral radius ρ and has arrived, the gradient lacks a share of
    order ρ^k; nothing flows to `init` unless k >= `length`. (In a rollout, where every
    state has a loss of its own, the same adjoint cuts at every k-th state instead.)

    The program's size does not depend on `length`.

    Args:
        adjoint: An adjoint of this package, or a specification of the same name.
        body: `x -> x_next`; may close over arrays, which are differentiated too.
        init: First iterate, a PyTree of arrays.
        length: Number of steps, >= 1, static.

    Returns:
        The last iterate.

    Raises:
        ValueError: A length below 1, an adjoint that has no meaning for a given number
            of steps: implicit differentiation needs a fixed point, backsolve an ODE.

    Example:
        >>> import jax
        >>> import trainax_pk as tx
        >>> from trainax_pk.adjoint import iterate
        >>> def relaxed(p, adjoint):  # towards p, by three tenths at a time
        ...     return iterate(adjoint, lambda x: x - 0.3 * (x - p), 0.0, 50)
        >>> slope = jax.grad(relaxed)
        >>> [round(float(slope(1.0, tx.KStepAdjoint(k))), 2) for k in (1, 2, 3)]
        [0.3, 0.51, 0.66]
        >>> round(float(slope(1.0, tx.DirectAdjoint())), 6)
        1.0
    """
    check_count("length", length)
    adjoint = to_solver_adjoint(adjoint)
    init = settled_carry(lambda x, _: (body(x), None), init, None, length)
    if not isinstance(adjoint, KStepAdjoint) or adjoint.k >= length:
        return _scan(adjoint.scan, body, init, length)
    # What the warm-up closes over is stopped as well as what it returns: no tangent
    # ever enters its loop, which therefore stores nothing.
    warm = eqx.filter_closure_convert(body, init)
    warm, start = _stopped((warm, init))
    last = _scan(_plain_scan, warm, start, length - adjoint.k)
    return _scan(_plain_scan, body, last, adjoint.k)


def to_solver_adjoint(spec: Any) -> AbstractAdjoint:
    """The adjoint of an iteration of given length that a specification names.

    Args:
        spec: An adjoint, or a foreign specification, matched by the class's name as by
            `to_rollout_adjoint`.

    Returns:
        An adjoint.

    Raises:
        ValueError: Implicit and backsolve adjoints, unknown names.

    Example:
        >>> import trainax_pk as tx
        >>> from trainax_pk.adjoint import to_solver_adjoint
        >>> to_solver_adjoint(tx.OneStepAdjoint())
        KStepAdjoint(k=1)
    """
    name = type(spec).__name__
    if name == "ImplicitAdjoint":
        raise ValueError(
            "Expected an adjoint of a given number of steps, got ImplicitAdjoint, which "
            "is true at a fixed point only. Use tx.solver.solve_4dvarnet_1d_fixedpoint "
            "(or _2d_), or RecursiveCheckpointAdjoint() or KStepAdjoint(k) here."
        )
    if name == "BacksolveAdjoint":
        raise ValueError(
            "Expected an adjoint of a given number of steps, got BacksolveAdjoint, which "
            "belongs to continuous-time dynamics. Use RecursiveCheckpointAdjoint()."
        )
    return to_rollout_adjoint(spec)


def _scan(scan: Any, body: Body, init: PyTree[Array], length: int) -> PyTree[Array]:
    return scan(lambda x, _: (body(x), None), init, None, length)[0]


def _plain_scan(body: Any, init: Any, xs: Any, length: int) -> Any:
    return jax.lax.scan(body, init, xs, length=length)


def _stopped(tree: PyTree[Any]) -> PyTree[Any]:
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)
