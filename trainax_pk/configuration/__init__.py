"""Compute graphs of training: pure maps from model and batch to a scalar loss."""

from trainax_pk.configuration._base import AbstractConfiguration, Aux
from trainax_pk.configuration._composite import Composite
from trainax_pk.configuration._diverted_chain import (
    DivertedChain,
    DivertedChainBranchOne,
)
from trainax_pk.configuration._mix_chain import MixChainPostPhysics
from trainax_pk.configuration._residuum import Residuum
from trainax_pk.configuration._supervised import Supervised
from trainax_pk.configuration._wrappers import (
    Curriculum,
    InputNoise,
    Pushforward,
    at_step,
)

__all__ = [
    "AbstractConfiguration",
    "Aux",
    "Composite",
    "Curriculum",
    "DivertedChain",
    "DivertedChainBranchOne",
    "InputNoise",
    "MixChainPostPhysics",
    "Pushforward",
    "Residuum",
    "Supervised",
    "at_step",
]
