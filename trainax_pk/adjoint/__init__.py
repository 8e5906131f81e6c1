"""How a loop is differentiated: what is stored, recomputed or cut."""

from trainax_pk.adjoint._base import AbstractAdjoint, bounded_while_loop
from trainax_pk.adjoint._direct import DirectAdjoint
from trainax_pk.adjoint._iterate import iterate, to_solver_adjoint
from trainax_pk.adjoint._k_step import KStepAdjoint, OneStepAdjoint
from trainax_pk.adjoint._recursive_checkpoint import RecursiveCheckpointAdjoint
from trainax_pk.adjoint._specs import to_rollout_adjoint

__all__ = [
    "AbstractAdjoint",
    "DirectAdjoint",
    "KStepAdjoint",
    "OneStepAdjoint",
    "RecursiveCheckpointAdjoint",
    "iterate",
    "bounded_while_loop",
    "to_rollout_adjoint",
    "to_solver_adjoint",
]
