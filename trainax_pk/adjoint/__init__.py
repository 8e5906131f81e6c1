"""How a loop is differentiated: what is stored, recomputed or cut."""

from diffrax import BacksolveAdjoint
from optimistix import ImplicitAdjoint

from trainax_pk.adjoint._agreement import Agreement
from trainax_pk.adjoint._base import AbstractAdjoint, bounded_while_loop
from trainax_pk.adjoint._calibrate import Calibration, assert_adjoint_calibrated
from trainax_pk.adjoint._direct import DirectAdjoint
from trainax_pk.adjoint._iterate import iterate, to_solver_adjoint
from trainax_pk.adjoint._k_step import KStepAdjoint, OneStepAdjoint
from trainax_pk.adjoint._ode import solve_ode
from trainax_pk.adjoint._probe import probe_checkpointed_gradients
from trainax_pk.adjoint._recursive_checkpoint import RecursiveCheckpointAdjoint
from trainax_pk.adjoint._report import AdjointReport, adjoint_report
from trainax_pk.adjoint._specs import (
    to_diffrax_adjoint,
    to_optimistix_adjoint,
    to_rollout_adjoint,
)

__all__ = [
    "AbstractAdjoint",
    "AdjointReport",
    "Agreement",
    "BacksolveAdjoint",
    "Calibration",
    "DirectAdjoint",
    "ImplicitAdjoint",
    "KStepAdjoint",
    "OneStepAdjoint",
    "RecursiveCheckpointAdjoint",
    "adjoint_report",
    "assert_adjoint_calibrated",
    "bounded_while_loop",
    "iterate",
    "probe_checkpointed_gradients",
    "solve_ode",
    "to_diffrax_adjoint",
    "to_optimistix_adjoint",
    "to_rollout_adjoint",
    "to_solver_adjoint",
]
