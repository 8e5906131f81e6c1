"""Where the metrics of a run are shown, by name."""

import abc
import importlib.util
import sys
from typing import Annotated, ClassVar, Literal

from pydantic import Field

import trainax_pk.tracker as trackers
from trainax_pk._extras import load
from trainax_pk.experiment._spec import AbstractSpec, register

Name = Annotated[str, Field(min_length=1)]


class AbstractTrackerSpec(AbstractSpec):
    """A tracker: `build()`. It changes no number, and is part of no hash.

    Attributes:
        package: What it imports, and the extra that brings it; None for nothing.
    """

    package: ClassVar[tuple[str, str] | None] = None

    def check(self) -> None:
        """Refuses a tracker that is not installed: a run would say so at its end."""
        if self.package is None or sys.modules.get(self.package[0]) is not None:
            # What is imported need have no spec: someone may have put it there by hand.
            return
        if importlib.util.find_spec(self.package[0]) is None:
            load(*self.package)

    @abc.abstractmethod
    def build(self) -> trackers.AbstractTracker:
        """The tracker, not yet open."""


@register("tracker")
class TensorBoard(AbstractTrackerSpec):
    """`tx.tracker.TensorBoard`: event files in the folder `name` of the run."""

    package: ClassVar = ("tensorboardX", "tensorboard")
    kind: Literal["tensorboard"] = "tensorboard"
    name: Name = "tensorboard"

    def build(self) -> trackers.TensorBoard:
        """The tracker."""
        return trackers.TensorBoard(self.name)


@register("tracker")
class MLflow(AbstractTrackerSpec):
    """`tx.tracker.MLflow`: to the server or store `uri`, by default in the run's folder."""

    package: ClassVar = ("mlflow", "mlflow")
    kind: Literal["mlflow"] = "mlflow"
    experiment: Name = "trainax_pk"
    uri: Name | None = None

    def build(self) -> trackers.MLflow:
        """The tracker."""
        return trackers.MLflow(self.experiment, self.uri)


@register("tracker")
class WeightsAndBiases(AbstractTrackerSpec):
    """`tx.tracker.WeightsAndBiases`."""

    package: ClassVar = ("wandb", "wandb")
    kind: Literal["wandb"] = "wandb"
    project: Name = "trainax_pk"
    mode: Literal["online", "offline"] = "online"

    def build(self) -> trackers.WeightsAndBiases:
        """The tracker."""
        return trackers.WeightsAndBiases(self.project, self.mode)
