"""Losses: how far one state is from another.

A loss is a plain function of one sample, `(prediction, target=None) -> scalar`. Without
a target it measures the distance from zero, so that it also reduces a residuum. States
are PyTrees of arrays without batch axis; the mean runs over all entries of all leaves.
The batch is reduced outside (`reduce_batch`), by the mean, or by the loss itself if it
is wrapped in `BatchLoss`.

To add one: write a function `(prediction, target=None) -> scalar`, in JAX, for one
sample. Nothing has to be registered.
"""

from ._batch import BatchLoss, reduce_batch
from ._distribution import crps_ensemble, gaussian_nll, kl_gaussian
from ._pointwise import mae, mse, nmae, nmse, nrmse, rmse
from ._spectral import h1, spectral_band
from ._weighted import weighted

__all__ = [
    "BatchLoss",
    "crps_ensemble",
    "gaussian_nll",
    "h1",
    "kl_gaussian",
    "mae",
    "mse",
    "nmae",
    "nmse",
    "nrmse",
    "reduce_batch",
    "rmse",
    "spectral_band",
    "weighted",
]
