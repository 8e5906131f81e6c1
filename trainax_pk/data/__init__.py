"""Data: trajectories, windows, order, splits; simulations, priors, caches, catalogs."""

from trainax_pk.data._cache import CachedDataset
from trainax_pk.data._cache_manifest import CacheDamaged
from trainax_pk.data._catalog import CatalogDataset
from trainax_pk.data._catalog_patches import (
    AbstractPatches,
    RandomPatches,
    RegularPatches,
)
from trainax_pk.data._catalog_statistics import Normalisation, fit_normalisation
from trainax_pk.data._catalog_table import Catalog
from trainax_pk.data._forward import (
    ForwardModel,
    Observation,
    Observed,
    Parametric,
    StepperModel,
    Stochastic,
)
from trainax_pk.data._forward_diffrax import DiffraxModel
from trainax_pk.data._hash import hash_content
from trainax_pk.data._items import as_items
from trainax_pk.data._order import AbstractOrder, SequentialOrder, ShuffledOrder
from trainax_pk.data._prior import (
    AbstractPrior,
    BoxUniform,
    Empirical,
    LogUniform,
    MultivariateNormal,
    Normal,
    Product,
)
from trainax_pk.data._prior_fields import FourierField, GaussianRandomField
from trainax_pk.data._samples import Samples
from trainax_pk.data._simulation import SimulationDataset
from trainax_pk.data._simulation_run import Simulated
from trainax_pk.data._simulation_windows import SimulatedWindows
from trainax_pk.data._split import Split, split_by_time, split_by_trajectory
from trainax_pk.data._stored_windows import StoredWindows
from trainax_pk.data._trajectories import Trajectories, as_trajectories
from trainax_pk.data._windows import WindowLayout, Windows

__all__ = [
    "AbstractOrder",
    "AbstractPatches",
    "AbstractPrior",
    "BoxUniform",
    "CacheDamaged",
    "CachedDataset",
    "Catalog",
    "CatalogDataset",
    "DiffraxModel",
    "Empirical",
    "ForwardModel",
    "FourierField",
    "GaussianRandomField",
    "LogUniform",
    "MultivariateNormal",
    "Normal",
    "Normalisation",
    "Observation",
    "Observed",
    "Parametric",
    "Product",
    "RandomPatches",
    "RegularPatches",
    "Samples",
    "SequentialOrder",
    "ShuffledOrder",
    "Simulated",
    "SimulatedWindows",
    "SimulationDataset",
    "Split",
    "StepperModel",
    "Stochastic",
    "StoredWindows",
    "Trajectories",
    "WindowLayout",
    "Windows",
    "as_items",
    "as_trajectories",
    "fit_normalisation",
    "hash_content",
    "split_by_time",
    "split_by_trajectory",
]
