"""Compute graphs of training: pure maps from model and batch to a scalar loss."""

from trainax_pk.configuration._amortized import (
    AmortizedNLL,
    EnsembleCRPS,
    FlowMatching,
    RatioEstimation,
    Variational,
)
from trainax_pk.configuration._base import AbstractConfiguration, Aux
from trainax_pk.configuration._composite import Composite
from trainax_pk.configuration._curriculum import Curriculum, at_step
from trainax_pk.configuration._diverted_chain import (
    DivertedChain,
    DivertedChainBranchOne,
)
from trainax_pk.configuration._generation import (
    Denoising,
    FieldFlowMatching,
    FieldRegression,
)
from trainax_pk.configuration._input_noise import InputNoise
from trainax_pk.configuration._mix_chain import MixChainPostPhysics
from trainax_pk.configuration._pushforward import Pushforward
from trainax_pk.configuration._reconstruction import Reconstruction
from trainax_pk.configuration._residuum import Residuum
from trainax_pk.configuration._supervised import Supervised

__all__ = [
    "AbstractConfiguration",
    "AmortizedNLL",
    "Aux",
    "Composite",
    "Curriculum",
    "Denoising",
    "DivertedChain",
    "DivertedChainBranchOne",
    "EnsembleCRPS",
    "FieldFlowMatching",
    "FieldRegression",
    "FlowMatching",
    "InputNoise",
    "MixChainPostPhysics",
    "Pushforward",
    "RatioEstimation",
    "Reconstruction",
    "Residuum",
    "Supervised",
    "Variational",
    "at_step",
]
