"""Data: validated trajectories, windows by index, stateless order, splits."""

from trainax_pk.data._order import AbstractOrder, SequentialOrder, ShuffledOrder
from trainax_pk.data._split import Split, split_by_time, split_by_trajectory
from trainax_pk.data._trajectories import Trajectories, as_trajectories
from trainax_pk.data._windows import WindowLayout, Windows

__all__ = [
    "AbstractOrder",
    "SequentialOrder",
    "ShuffledOrder",
    "Split",
    "Trajectories",
    "WindowLayout",
    "Windows",
    "as_trajectories",
    "split_by_time",
    "split_by_trajectory",
]
