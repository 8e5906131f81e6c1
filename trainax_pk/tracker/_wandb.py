"""Runs that Weights & Biases shows."""

import uuid
from pathlib import Path
from typing import Any, Literal

from trainax_pk._extras import load
from trainax_pk.tracker._base import AbstractTracker, flat_values, remembered

# What curves are plotted over. A run that goes on sends some of its lines once more,
# which the counter of this backend would refuse.
_UPDATE = "update"


class WeightsAndBiases(AbstractTracker):
    """Logs to Weights & Biases, or offline into a folder of the run, `wandb/`.

    Needs the extra `wandb`. A run that goes on is the same run there: its number is kept
    in `wandb.txt`.

    Attributes:
        project: Name of the project.
        mode: "online"; or "offline", to be sent later with `wandb sync`.

    Example:
        >>> from trainax_pk.tracker import WeightsAndBiases
        >>> WeightsAndBiases("emulators", mode="offline").project
        'emulators'
    """

    def __init__(
        self,
        project: str = "trainax_pk",
        mode: Literal["online", "offline"] = "online",
    ) -> None:
        self.project = project
        self.mode = mode
        self._run: Any = None

    def open(self, run_dir: Path) -> None:
        """Begins, or goes on with, a run that is called like the folder."""
        library = load("wandb", "wandb")
        number = remembered(run_dir, "wandb.txt", lambda: uuid.uuid4().hex[:16])
        self._run = library.init(
            project=self.project,
            name=run_dir.name,
            id=number,
            dir=str(run_dir),
            mode=self.mode,
            resume="allow" if self.mode == "online" else None,
            # Output belongs to the user, and the process to the run.
            settings=library.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric=_UPDATE)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """All numbers of a line at once."""
        self._run.log({_UPDATE: step, **flat_values(values)})

    def close(self) -> None:
        """Writes what is left."""
        self._run.finish()
