"""Amortized inference: densities of parameters given observations, and their checks.

Networks that are trained on simulated pairs (θ, x) and then answer for every x:
posteriors, likelihoods, likelihood ratios. Configurations train them
(`tx.configuration.AmortizedNLL`, `RatioEstimation`, `FlowMatching`), diagnostics with
p-values judge them.

To add a head or an encoder, see `AbstractHead` and `AbstractEncoder`.
"""

from trainax_pk.amortized._agreement import (
    PosteriorAgreement,
    assert_posterior_agreement,
    posterior_agreement,
)
from trainax_pk.amortized._c2st import c2st
from trainax_pk.amortized._calibration import (
    CoverageReport,
    RankReport,
    expected_coverage,
    simulation_based_calibration,
    tarp,
    uniformity_p_value,
)
from trainax_pk.amortized._encoder import (
    AbstractEncoder,
    ConvEncoder,
    IdentityEncoder,
    MLPEncoder,
    SetEncoder,
)
from trainax_pk.amortized._flow import (
    Flow,
    coupling_flow,
    masked_autoregressive_flow,
)
from trainax_pk.amortized._flow_matching import FlowMatchingPosterior
from trainax_pk.amortized._gaussian import (
    DiagonalGaussian,
    FullGaussian,
    LowRankGaussian,
)
from trainax_pk.amortized._head import AbstractHead
from trainax_pk.amortized._likelihood import AmortizedLikelihood, AmortizedRatio
from trainax_pk.amortized._mcmc import Chains, sample_posterior
from trainax_pk.amortized._mixture import GaussianMixture
from trainax_pk.amortized._pairs import Pairs, as_pairs
from trainax_pk.amortized._plots import (
    plot_coverage,
    plot_pairs,
    plot_predictive,
    plot_ranks,
)
from trainax_pk.amortized._posterior import AmortizedPosterior, PosteriorEnsemble
from trainax_pk.amortized._predictive import posterior_predictive
from trainax_pk.amortized._scale import Standardisation, fit_standardisation
from trainax_pk.amortized._support import Support
from trainax_pk.amortized._training import amortized_nll_loss_fn, amortized_train_step

__all__ = [
    "AbstractEncoder",
    "AbstractHead",
    "AmortizedLikelihood",
    "AmortizedPosterior",
    "AmortizedRatio",
    "Chains",
    "ConvEncoder",
    "CoverageReport",
    "DiagonalGaussian",
    "Flow",
    "FlowMatchingPosterior",
    "FullGaussian",
    "GaussianMixture",
    "IdentityEncoder",
    "LowRankGaussian",
    "MLPEncoder",
    "Pairs",
    "PosteriorAgreement",
    "PosteriorEnsemble",
    "RankReport",
    "SetEncoder",
    "Standardisation",
    "Support",
    "amortized_nll_loss_fn",
    "amortized_train_step",
    "as_pairs",
    "assert_posterior_agreement",
    "c2st",
    "coupling_flow",
    "expected_coverage",
    "fit_standardisation",
    "masked_autoregressive_flow",
    "plot_coverage",
    "plot_pairs",
    "plot_predictive",
    "plot_ranks",
    "posterior_agreement",
    "posterior_predictive",
    "sample_posterior",
    "simulation_based_calibration",
    "tarp",
    "uniformity_p_value",
]
