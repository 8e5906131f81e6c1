"""What evaluations decide: which model is best, and when training ends."""

from trainax_pk.evaluation._early_stopping import EarlyStopping, Monitor, Progress

__all__ = ["EarlyStopping", "Monitor", "Progress"]
