"""Networks of other frameworks in the same train step.

`from_flax` and `from_keras` give a `tx.Stepper` whose weights are leaves of a PyTree;
everything that takes a stepper takes it. `to_flax` and `to_keras` give the network back,
trained. Networks of torch keep their own loop: `trainax_pk.experiment.to_lightning` hands
them the data and the optimizer of a run, and `optax_for_torch` any optimizer of optax.
"""

from trainax_pk.framework._flax import FlaxModel, from_flax, to_flax
from trainax_pk.framework._keras import KerasModel, from_keras, to_keras
from trainax_pk.framework._torch import optax_for_torch

__all__ = [
    "FlaxModel",
    "KerasModel",
    "from_flax",
    "from_keras",
    "optax_for_torch",
    "to_flax",
    "to_keras",
]
