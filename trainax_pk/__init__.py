"""JAX-native functional training for neural emulators.

Configurations (what is computed) combine with adjoints (how loops are differentiated)
into train steps (pure functions), which trainers run.
"""

from trainax_pk import (
    adjoint,
    amortized,
    callback,
    checkpoint,
    configuration,
    data,
    engine,
    evaluation,
    framework,
    generation,
    loss,
    metrics,
    sample_data,
    solver,
    step,
    tracker,
    trainer,
)
from trainax_pk._batch import Batch1D, Batch2D
from trainax_pk._rollout import rollout
from trainax_pk._stepper import Stepper
from trainax_pk._types import Inputs, Window
from trainax_pk.adjoint import (
    DirectAdjoint,
    KStepAdjoint,
    OneStepAdjoint,
    RecursiveCheckpointAdjoint,
)
from trainax_pk.step import TrainState, make_eval_step, make_train_step

__all__ = [
    "Batch1D",
    "Batch2D",
    "DirectAdjoint",
    "Inputs",
    "KStepAdjoint",
    "OneStepAdjoint",
    "RecursiveCheckpointAdjoint",
    "Stepper",
    "TrainState",
    "Window",
    "adjoint",
    "amortized",
    "callback",
    "checkpoint",
    "configuration",
    "data",
    "engine",
    "evaluation",
    "framework",
    "generation",
    "loss",
    "make_eval_step",
    "make_train_step",
    "metrics",
    "rollout",
    "sample_data",
    "solver",
    "step",
    "tracker",
    "trainer",
]
