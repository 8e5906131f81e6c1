"""The surface of trainax 0.0.2 over this package's core.

Names, call signatures, defaults, return types and the order of minibatches for a key are
those of trainax; code written for it runs with one import changed:

    import trainax_pk.compat as tx

Differences: rollouts are scanned, windows are gathered instead of stacked, and the
updates between callbacks run in compiled chunks, so that results agree to rounding, not
to the last bit. A batch that is larger than the data warns instead of printing.
"""

from trainax_pk.compat import callback, configuration, loss, sample_data, trainer
from trainax_pk.compat._general_trainer import GeneralTrainer
from trainax_pk.compat._mixer import PermutationMixer, TrajectorySubStacker

__all__ = [
    "GeneralTrainer",
    "PermutationMixer",
    "TrajectorySubStacker",
    "callback",
    "configuration",
    "loss",
    "sample_data",
    "trainer",
]
