"""Runs that MLflow shows."""

import os
import time
from pathlib import Path
from typing import Any

from trainax_pk._extras import load
from trainax_pk.tracker._base import AbstractTracker, flat_values, remembered


class MLflow(AbstractTracker):
    """Logs to an MLflow server, or into a folder of the run, `mlruns/`.

    Needs the extra `mlflow`. A run that goes on is the same MLflow run: its number is
    kept in `mlflow.txt`.

    Attributes:
        experiment: Name of the experiment.
        uri: Address of the server or store; None for a folder of the run.

    Example:
        >>> from trainax_pk.tracker import MLflow
        >>> MLflow("emulators").uri is None
        True
    """

    def __init__(self, experiment: str = "trainax_pk", uri: str | None = None) -> None:
        self.experiment = experiment
        self.uri = uri
        self._client: Any = None
        self._metric: Any = None
        self._run = ""

    def open(self, run_dir: Path) -> None:
        """Begins, or goes on with, an MLflow run that is called like the folder."""
        if self.uri is None:
            # It advises a database, which a folder of one run has no use for.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        library = load("mlflow", "mlflow")
        self._metric = library.entities.Metric
        uri = self.uri or (run_dir / "mlruns").absolute().as_uri()
        self._client = client = library.MlflowClient(tracking_uri=uri)

        def begin() -> str:
            known = client.get_experiment_by_name(self.experiment)
            number = (
                client.create_experiment(self.experiment)
                if known is None
                else known.experiment_id
            )
            return client.create_run(number, run_name=run_dir.name).info.run_id

        self._run = remembered(run_dir, "mlflow.txt", begin)
        client.update_run(self._run, status="RUNNING")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """All numbers of a line at once."""
        now = int(1000 * time.time())
        self._client.log_batch(
            self._run,
            [self._metric(k, x, now, step) for k, x in flat_values(values).items()],
        )

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._run)
