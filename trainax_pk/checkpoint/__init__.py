"""Runs that can be killed at any instant and end in the same bits."""

from trainax_pk.checkpoint._identity import RunChanged
from trainax_pk.checkpoint._load import Match, load_model
from trainax_pk.checkpoint._log import read_metrics
from trainax_pk.checkpoint._policy import Policy
from trainax_pk.checkpoint._run_base import Segment
from trainax_pk.checkpoint._start import Start
from trainax_pk.checkpoint._store import CheckpointDamaged
from trainax_pk.checkpoint._team import ProcessLost
from trainax_pk.checkpoint._writer import NotFinite, SaveFailed

__all__ = [
    "CheckpointDamaged",
    "Match",
    "NotFinite",
    "Policy",
    "ProcessLost",
    "RunChanged",
    "SaveFailed",
    "Segment",
    "Start",
    "load_model",
    "read_metrics",
]
