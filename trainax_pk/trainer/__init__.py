"""Training loops over windows of trajectories."""

from trainax_pk.trainer._history import History, Record
from trainax_pk.trainer._siblings import (
    DivertedChainBranchOneTrainer,
    DivertedChainTrainer,
    MixChainTrainer,
    ResiduumTrainer,
    SupervisedTrainer,
)
from trainax_pk.trainer._trainer import Trainer

__all__ = [
    "DivertedChainBranchOneTrainer",
    "DivertedChainTrainer",
    "History",
    "MixChainTrainer",
    "Record",
    "ResiduumTrainer",
    "SupervisedTrainer",
    "Trainer",
]
