"""Inverse solvers: states from incomplete observations, learned and classical."""

from trainax_pk.solver._analysis import AnalysisStep, as_analysis_step
from trainax_pk.solver._autoencoder import (
    BilinAEPrior1D,
    BilinAEPrior2D,
    ConvAEPrior1D,
    ConvAEPrior2D,
)
from trainax_pk.solver._block_tridiagonal import BlockTridiagonal
from trainax_pk.solver._conv_lstm import (
    ConvLSTMCell,
    ConvLSTMGradMod1D,
    ConvLSTMGradMod2D,
    LSTMState1D,
    LSTMState2D,
)
from trainax_pk.solver._cost import VariationalCost, Weight
from trainax_pk.solver._cycle import Cycle, cycle
from trainax_pk.solver._fixed_point import (
    FixedPoint,
    solve_4dvarnet_1d_fixedpoint,
    solve_4dvarnet_2d_fixedpoint,
)
from trainax_pk.solver._four_d_var import strong_4dvar, weak_4dvar
from trainax_pk.solver._four_d_var_net import FourDVarNet1D, FourDVarNet2D
from trainax_pk.solver._inversion import (
    ConvInversion1D,
    ConvInversion2D,
    Sequential,
)
from trainax_pk.solver._linear_interpolation import linear_interpolation
from trainax_pk.solver._losses import reconstruction_loss
from trainax_pk.solver._modulated_steps import (
    one_step_solve_4dvarnet_1d,
    one_step_solve_4dvarnet_2d,
    solve_4dvarnet_1d,
    solve_4dvarnet_2d,
)
from trainax_pk.solver._modulator import (
    AbstractGradMod,
    GradientDescent,
    MLPGradMod,
    rms_scale,
)
from trainax_pk.solver._optimal_interpolation import optimal_interpolation
from trainax_pk.solver._preconditioner import AbstractPreconditioner, GaussNewton
from trainax_pk.solver._prior import AbstractPrior, DynamicalPrior, IdentityPrior
from trainax_pk.solver._training import eval_step, train_loss_fn, train_step
from trainax_pk.solver._windows import Analysis

__all__ = [
    "AbstractGradMod",
    "AbstractPreconditioner",
    "AbstractPrior",
    "Analysis",
    "AnalysisStep",
    "BilinAEPrior1D",
    "BilinAEPrior2D",
    "BlockTridiagonal",
    "ConvAEPrior1D",
    "ConvAEPrior2D",
    "ConvInversion1D",
    "ConvInversion2D",
    "ConvLSTMCell",
    "ConvLSTMGradMod1D",
    "ConvLSTMGradMod2D",
    "Cycle",
    "DynamicalPrior",
    "FixedPoint",
    "FourDVarNet1D",
    "FourDVarNet2D",
    "GaussNewton",
    "GradientDescent",
    "IdentityPrior",
    "LSTMState1D",
    "LSTMState2D",
    "MLPGradMod",
    "Sequential",
    "VariationalCost",
    "Weight",
    "as_analysis_step",
    "cycle",
    "eval_step",
    "linear_interpolation",
    "one_step_solve_4dvarnet_1d",
    "one_step_solve_4dvarnet_2d",
    "optimal_interpolation",
    "reconstruction_loss",
    "rms_scale",
    "solve_4dvarnet_1d",
    "solve_4dvarnet_1d_fixedpoint",
    "solve_4dvarnet_2d",
    "solve_4dvarnet_2d_fixedpoint",
    "strong_4dvar",
    "train_loss_fn",
    "train_step",
    "weak_4dvar",
]
