"""Where the metrics of a run are shown: off the training path, and never in its way."""

from trainax_pk.tracker._base import AbstractTracker
from trainax_pk.tracker._tensorboard import TensorBoard

__all__ = ["AbstractTracker", "TensorBoard"]
