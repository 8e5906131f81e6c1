"""A stencil for linear advection, learned over 1, 5 and 20 steps."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainax_pk as tx

CFL = -0.75
# First-order upwind for waves that travel to the left: the one stencil of width 2 that
# is consistent with the equation.
UPWIND = np.array([1 + CFL, -CFL])


def learn_stencils(
    rollout_steps: Sequence[int] = (1, 5, 20), *, num_training_steps: int = 1000
) -> dict[int, np.ndarray]:
    """Trains one stencil for each number of rollout steps.

    Args:
        rollout_steps: Numbers of supervised rollout steps.
        num_training_steps: Updates of each training.

    Returns:
        By number of rollout steps, the two weights (own point, right neighbour).
    """
    data = tx.sample_data.advection_1d_periodic(cfl=CFL, key=jax.random.key(0))
    model = eqx.nn.Conv1d(
        1,
        1,
        2,
        padding="SAME",
        padding_mode="CIRCULAR",
        use_bias=False,
        key=jax.random.key(42),
    )
    stencils = {}
    for steps in rollout_steps:
        trainer = tx.trainer.SupervisedTrainer(
            data,
            num_rollout_steps=steps,
            optimizer=optax.adam(1e-2),
            num_training_steps=num_training_steps,
            batch_size=32,
            progress=False,
        )
        trained, _ = trainer(model, key=jax.random.key(1))
        stencils[steps] = np.asarray(trained.weight[0, 0])
    return stencils


def distance_to_upwind(stencil: np.ndarray) -> float:
    """Euclidean distance of a stencil to first-order upwind."""
    return float(jnp.linalg.norm(jnp.asarray(stencil - UPWIND)))


def amplification(stencil: np.ndarray, wavenumbers: np.ndarray) -> np.ndarray:
    """Factor a + b e^{iθ} by which a stencil multiplies the mode of phase θ per cell."""
    return stencil[0] + stencil[1] * np.exp(1j * wavenumbers)
