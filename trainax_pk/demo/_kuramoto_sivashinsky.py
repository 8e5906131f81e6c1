"""An emulator of the Kuramoto-Sivashinsky equation, trained on rollouts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainax_pk as tx
from trainax_pk.demo._emulator import ConvEmulator

NUM_POINTS = 128
DOMAIN_EXTENT = 48.0
DT = 0.5
_NUM_TEST_STEPS = 120


class Evaluation(eqx.Module):
    """What is reported of a trained emulator.

    Attributes:
        reference: Test trajectories after the initial state, `(S, T, 1, N)`.
        prediction: The emulator's, from the same initial states.
        nrmse: Error of the emulator by lead time, `(T,)`.
        persistence: Error of the initial state as a forecast, `(T,)`.
        loss: Training loss of each update.
        program: What the engine ran, and why.
        num_parameters: Number of trained numbers.
    """

    reference: np.ndarray
    prediction: np.ndarray
    nrmse: np.ndarray
    persistence: np.ndarray
    loss: np.ndarray
    program: str
    num_parameters: int


def train_emulator(
    *, num_training_steps: int = 1500, num_samples: int = 100, width: int = 24
) -> Evaluation:
    """Trains on rollouts with a checkpointed adjoint and judges long rollouts.

    Noise on the initial states of the windows teaches the emulator to return to the
    attractor; without it the long rollout leaves it and blows up.

    Args:
        num_training_steps: Updates.
        num_samples: Trajectories to train on.
        width: Hidden channels.

    Returns:
        The evaluation on trajectories of its own key.
    """
    train, test = _data(num_samples, 0), _data(8, 1)
    model = ConvEmulator(width, 4, key=jax.random.key(2))
    configuration = tx.configuration.InputNoise(
        tx.configuration.Supervised(5, adjoint=tx.RecursiveCheckpointAdjoint()),
        std=0.04,
    )
    trainer = tx.trainer.Trainer(
        train,
        configuration,
        optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, num_training_steps)),
        num_training_steps=num_training_steps,
        batch_size=16,
        max_grad_norm=1.0,
    )
    model, history = trainer(model, key=jax.random.key(3))
    reference = test[:, 1:]
    prediction = jax.jit(jax.vmap(lambda u: tx.rollout(model, u, _NUM_TEST_STEPS)))(
        test[:, 0]
    )
    held = jnp.broadcast_to(test[:, :1], reference.shape)
    return Evaluation(
        reference=np.asarray(reference),
        prediction=np.asarray(prediction),
        nrmse=np.asarray(tx.metrics.nrmse_per_lead_time(prediction, reference)),
        persistence=np.asarray(tx.metrics.nrmse_per_lead_time(held, reference)),
        loss=np.asarray(history.loss),
        program=history.program,
        num_parameters=sum(
            x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))
        ),
    )


def _data(num_samples: int, seed: int) -> jax.Array:
    return tx.sample_data.kuramoto_sivashinsky_1d(
        NUM_POINTS,
        num_samples,
        domain_extent=DOMAIN_EXTENT,
        dt=DT,
        num_substeps=2,
        num_warmup_steps=200,
        temporal_horizon=_NUM_TEST_STEPS + 1,
        key=jax.random.key(seed),
    )
