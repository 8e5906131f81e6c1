"""A run is a file: typed descriptions, what they train, and what that leaves behind."""

from trainax_pk.experiment import (
    _callback,
    _configuration,
    _data,
    _data_files,
    _data_samples,
    _generation,
    _model,
    _model_inverse,
    _optimizer,
    _sampler,
    _schedule,
    _tracker,
)
from trainax_pk.experiment._adjoints import compare_adjoints
from trainax_pk.experiment._artifact import (
    ARTIFACT,
    RUN,
    Reproduction,
    read_artifact,
    reproduce,
    train,
)
from trainax_pk.experiment._lightning import HandOff, to_lightning
from trainax_pk.experiment._model import FlatMLP
from trainax_pk.experiment._operator import (
    Operator,
    Sequential,
    Standardise,
    load_operator,
)
from trainax_pk.experiment._registry import Registry
from trainax_pk.experiment._report import REPORT, report
from trainax_pk.experiment._run import Built, Run, build, read_run
from trainax_pk.experiment._sampler import ParameterGrid
from trainax_pk.experiment._schema import json_schema
from trainax_pk.experiment._spec import (
    AbstractSpec,
    Family,
    kinds_of,
    register,
)
from trainax_pk.experiment._sweep import RANKING, SWEEP, Ranked, sweep
from trainax_pk.experiment._sweep_spec import HyperSweep, Pruning, Trial, read_sweep
from trainax_pk.experiment._weights import ArtifactDamaged
from trainax_pk.experiment._yaml import RunFileError

# Their kinds are registered when they are imported.
KINDS = (
    _callback,
    _configuration,
    _data,
    _data_files,
    _data_samples,
    _generation,
    _model,
    _model_inverse,
    _optimizer,
    _sampler,
    _schedule,
    _tracker,
)

__all__ = [
    "ARTIFACT",
    "RANKING",
    "REPORT",
    "RUN",
    "SWEEP",
    "AbstractSpec",
    "ArtifactDamaged",
    "Built",
    "Family",
    "FlatMLP",
    "HandOff",
    "HyperSweep",
    "Operator",
    "ParameterGrid",
    "Pruning",
    "Ranked",
    "Registry",
    "Reproduction",
    "Run",
    "RunFileError",
    "Sequential",
    "Standardise",
    "Trial",
    "build",
    "compare_adjoints",
    "json_schema",
    "kinds_of",
    "load_operator",
    "read_artifact",
    "read_run",
    "read_sweep",
    "register",
    "report",
    "reproduce",
    "sweep",
    "to_lightning",
    "train",
]
