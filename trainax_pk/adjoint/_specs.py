"""Adjoints named by specifications, for each layer."""

from typing import Any

import diffrax
import lineax as lx
import optimistix

from trainax_pk.adjoint._base import AbstractAdjoint
from trainax_pk.adjoint._diffrax_checkpoint import CheckedCheckpointAdjoint
from trainax_pk.adjoint._direct import DirectAdjoint
from trainax_pk.adjoint._k_step import KStepAdjoint
from trainax_pk.adjoint._recursive_checkpoint import RecursiveCheckpointAdjoint

_USE = (
    "Use DirectAdjoint(), RecursiveCheckpointAdjoint(checkpoints) or KStepAdjoint(k)."
)
_USE_IN_SOLVES = f"{_USE[:-1]}, or ImplicitAdjoint(linear_solver) at a solution."
_USE_IN_ODES = (
    "Use DirectAdjoint(), RecursiveCheckpointAdjoint(checkpoints), BacksolveAdjoint(), "
    "or ImplicitAdjoint(linear_solver) at a steady state."
)


def to_rollout_adjoint(spec: Any) -> AbstractAdjoint:
    """The rollout-layer adjoint that a specification names.

    Adjoints of this package pass through. Any other object is matched by the name of
    its class, so that same-named dataclasses of other packages are understood without
    importing them: `DirectAdjoint`, `RecursiveCheckpointAdjoint(checkpoints)`,
    `KStepAdjoint(k)`, `TruncatedAdjoint(k)`, `OneStepAdjoint`.

    Args:
        spec: An adjoint, or a foreign specification.

    Returns:
        An adjoint whose `scan` a rollout can use.

    Raises:
        ValueError: The specification has no meaning for a rollout (implicit and
            backsolve adjoints), or its name is unknown.

    Example:
        >>> import dataclasses
        >>> from trainax_pk.adjoint import to_rollout_adjoint
        >>> TruncatedAdjoint = dataclasses.make_dataclass("TruncatedAdjoint", ["k"])
        >>> to_rollout_adjoint(TruncatedAdjoint(k=3))
        KStepAdjoint(k=3)
    """
    if isinstance(spec, AbstractAdjoint):
        return spec
    name = type(spec).__name__
    if name == "DirectAdjoint":
        return DirectAdjoint()
    if name == "RecursiveCheckpointAdjoint":
        return RecursiveCheckpointAdjoint(_field(spec, "checkpoints"))
    if name == "OneStepAdjoint":
        return KStepAdjoint(1)
    if name in ("KStepAdjoint", "TruncatedAdjoint"):
        return KStepAdjoint(_field(spec, "k"))
    if name == "ImplicitAdjoint":
        raise ValueError(
            "Expected an adjoint of the rollout layer, got ImplicitAdjoint, which "
            f"belongs to inner solves that reach a fixed point. {_USE}"
        )
    if name == "BacksolveAdjoint":
        raise ValueError(
            "Expected an adjoint of the rollout layer, got BacksolveAdjoint, which "
            f"belongs to continuous-time dynamics. {_USE}"
        )
    raise ValueError(f"Expected an adjoint of the rollout layer, got {spec!r}. {_USE}")


def to_optimistix_adjoint(spec: Any) -> optimistix.AbstractAdjoint:
    """The adjoint of an inner solve that a specification names.

    Adjoints of optimistix pass through; this package's are among them. Any other object
    is matched by the name of its class: `DirectAdjoint`,
    `RecursiveCheckpointAdjoint(checkpoints)`, `KStepAdjoint(k)`, `TruncatedAdjoint(k)`,
    `OneStepAdjoint`, `ImplicitAdjoint(linear_solver)`.

    Args:
        spec: An adjoint, or a foreign specification.

    Returns:
        An adjoint for `optimistix.fixed_point`, `root_find`, `least_squares` and
        `minimise`.

    Raises:
        ValueError: The specification has no meaning for an inner solve (backsolve), its
            name is unknown, or an option is not what optimistix takes.

    Example:
        >>> import diffrax, lineax
        >>> from trainax_pk.adjoint import to_optimistix_adjoint
        >>> foreign = diffrax.ImplicitAdjoint(linear_solver=lineax.LU())
        >>> to_optimistix_adjoint(foreign)
        ImplicitAdjoint(linear_solver=LU())
    """
    layer = "inner-solve layer"
    if isinstance(spec, optimistix.AbstractAdjoint):
        return spec
    name = type(spec).__name__
    if name in _ROLLOUT_NAMES:
        return to_rollout_adjoint(spec)
    if name == "ImplicitAdjoint":
        return optimistix.ImplicitAdjoint(_linear_solver(spec, layer, _USE_IN_SOLVES))
    if name == "BacksolveAdjoint":
        raise ValueError(
            f"Expected an adjoint of the {layer}, got BacksolveAdjoint, which belongs "
            f"to continuous-time dynamics. {_USE_IN_SOLVES}"
        )
    raise ValueError(
        f"Expected an adjoint of the {layer}, got {spec!r}. {_USE_IN_SOLVES}"
    )


def to_diffrax_adjoint(spec: Any) -> diffrax.AbstractAdjoint:
    """The adjoint of an ordinary differential equation that a specification names.

    Adjoints of diffrax pass through. Any other object is matched by the name of its
    class: `DirectAdjoint`, `RecursiveCheckpointAdjoint(checkpoints)`,
    `BacksolveAdjoint`, `ImplicitAdjoint(linear_solver)`. The checkpointed one refuses
    what diffrax is known to differentiate wrongly; `solve_ode` does not
    depend on it where steps are fixed.

    Args:
        spec: An adjoint, or a foreign specification.

    Returns:
        An adjoint for `diffrax.diffeqsolve`.

    Raises:
        ValueError: The specification has no meaning for an ODE (k-step adjoints), its
            name is unknown, or an option is not what diffrax takes.

    Example:
        >>> import optimistix
        >>> import trainax_pk as tx
        >>> from trainax_pk.adjoint import to_diffrax_adjoint
        >>> type(to_diffrax_adjoint(tx.DirectAdjoint())).__module__.split(".")[0]
        'diffrax'
    """
    layer = "ODE layer"
    if isinstance(spec, diffrax.AbstractAdjoint):
        return spec
    name = type(spec).__name__
    if name == "DirectAdjoint":
        return diffrax.DirectAdjoint()
    if name == "RecursiveCheckpointAdjoint":
        return CheckedCheckpointAdjoint(to_rollout_adjoint(spec).checkpoints)
    if name == "ImplicitAdjoint":
        return diffrax.ImplicitAdjoint(_linear_solver(spec, layer, _USE_IN_ODES))
    if name == "BacksolveAdjoint":
        return diffrax.BacksolveAdjoint()
    if name in _ROLLOUT_NAMES:
        raise ValueError(
            f"Expected an adjoint of the {layer}, got {spec!r}, which belongs to "
            f"rollouts and inner solves. {_USE_IN_ODES}"
        )
    raise ValueError(
        f"Expected an adjoint of the {layer}, got {spec!r}. {_USE_IN_ODES}"
    )


_ROLLOUT_NAMES = (
    "DirectAdjoint",
    "RecursiveCheckpointAdjoint",
    "KStepAdjoint",
    "OneStepAdjoint",
    "TruncatedAdjoint",
)


def _linear_solver(spec: Any, layer: str, use: str) -> lx.AbstractLinearSolver:
    solver = getattr(spec, "linear_solver", None)
    if solver is None:
        return lx.AutoLinearSolver(well_posed=None)
    if not isinstance(solver, lx.AbstractLinearSolver):
        raise ValueError(
            f"Expected `linear_solver` of an ImplicitAdjoint of the {layer} to be a "
            f"lineax.AbstractLinearSolver, got {solver!r}. {use}"
        )
    return solver


def _field(spec: Any, name: str) -> Any:
    if not hasattr(spec, name):
        raise ValueError(
            f"Expected {type(spec).__name__} to have a field `{name}`, got {spec!r}. "
            f"{_USE}"
        )
    return getattr(spec, name)
