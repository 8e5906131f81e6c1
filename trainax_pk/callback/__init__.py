"""What looks at training every so many updates, and never changes it."""

from trainax_pk.callback._base import AbstractCallback, Context
from trainax_pk.callback._evaluate import Loss, RolloutMetrics, Validation
from trainax_pk.callback._generation import Generation
from trainax_pk.callback._norms import GradNorm, WeightNorm
from trainax_pk.callback._snapshot import Function, GetNetwork

__all__ = [
    "AbstractCallback",
    "Context",
    "Function",
    "Generation",
    "GetNetwork",
    "GradNorm",
    "Loss",
    "RolloutMetrics",
    "Validation",
    "WeightNorm",
]
