"""A run is a file: typed descriptions, what they train, and what that leaves behind."""

from trainax_pk.experiment import (
    _callback,
    _configuration,
    _data,
    _model,
    _optimizer,
    _schedule,
)
from trainax_pk.experiment._artifact import (
    ARTIFACT,
    Operator,
    Reproduction,
    load_operator,
    read_artifact,
    reproduce,
    train,
)
from trainax_pk.experiment._model import FlatMLP
from trainax_pk.experiment._run import Built, Run, build, json_schema, read_run
from trainax_pk.experiment._spec import (
    AbstractSpec,
    Family,
    kinds_of,
    register,
)
from trainax_pk.experiment._weights import ArtifactDamaged
from trainax_pk.experiment._yaml import RunFileError

# Their kinds are registered when they are imported.
KINDS = (_callback, _configuration, _data, _model, _optimizer, _schedule)

__all__ = [
    "ARTIFACT",
    "AbstractSpec",
    "ArtifactDamaged",
    "Built",
    "Family",
    "FlatMLP",
    "Operator",
    "Reproduction",
    "Run",
    "RunFileError",
    "build",
    "json_schema",
    "kinds_of",
    "read_artifact",
    "read_run",
    "register",
    "reproduce",
    "train",
    "load_operator",
]
