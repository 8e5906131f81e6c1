"""Adjoints named by other packages' specifications."""

from typing import Any

from trainax_pk.adjoint._base import AbstractAdjoint
from trainax_pk.adjoint._direct import DirectAdjoint
from trainax_pk.adjoint._k_step import KStepAdjoint
from trainax_pk.adjoint._recursive_checkpoint import RecursiveCheckpointAdjoint

_USE = (
    "Use DirectAdjoint(), RecursiveCheckpointAdjoint(checkpoints) or KStepAdjoint(k)."
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


def _field(spec: Any, name: str) -> Any:
    if not hasattr(spec, name):
        raise ValueError(
            f"Expected {type(spec).__name__} to have a field `{name}`, got {spec!r}. "
            f"{_USE}"
        )
    return getattr(spec, name)
