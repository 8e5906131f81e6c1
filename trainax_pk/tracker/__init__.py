"""Where the metrics of a run are shown: off the training path, and never in its way."""

from trainax_pk.tracker._base import AbstractTracker
from trainax_pk.tracker._mlflow import MLflow
from trainax_pk.tracker._tensorboard import TensorBoard
from trainax_pk.tracker._wandb import WeightsAndBiases

__all__ = ["AbstractTracker", "MLflow", "TensorBoard", "WeightsAndBiases"]
