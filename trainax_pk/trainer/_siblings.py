"""Trainers named after their configuration."""

from typing import Any

from jaxtyping import Array, PyTree

from trainax_pk.configuration import (
    DivertedChain,
    MixChainPostPhysics,
    Residuum,
    Supervised,
)
from trainax_pk.data import Trajectories
from trainax_pk.trainer._trainer import Trainer

_CONFIGURATION_OPTIONS = (
    "num_branch_steps",
    "num_post_physics_steps",
    "time_level_loss",
    "cut_bptt",
    "cut_bptt_every",
    "cut_div_chain",
    "cut_prev",
    "cut_next",
    "time_level_weights",
    "branch_level_weights",
    "adjoint",
)


def SupervisedTrainer(  # noqa: N802
    data: Trajectories | PyTree[Array], *, num_rollout_steps: int = 1, **options: Any
) -> Trainer:
    """A `Trainer` of the `Supervised` configuration.

    Args:
        data: Trajectories, leaves `(num_samples, num_times, ...)`.
        num_rollout_steps: Number T of rollout steps.
        **options: Those of `Supervised` and of `Trainer`.

    Returns:
        The trainer.

    Raises:
        ValueError: As `Supervised` and `Trainer`.

    Example:
        >>> import jax
        >>> import optax
        >>> import trainax_pk as tx
        >>> trainer = tx.trainer.SupervisedTrainer(
        ...     tx.sample_data.advection_1d_periodic(key=jax.random.key(0)),
        ...     num_rollout_steps=5, optimizer=optax.adam(1e-2),
        ...     num_training_steps=1000, batch_size=32,
        ... )
        >>> trainer.configuration.num_times
        6
    """
    chosen, rest = _split(options)
    return Trainer(data, Supervised(num_rollout_steps, **chosen), **rest)


def DivertedChainTrainer(  # noqa: N802
    data: Trajectories | PyTree[Array],
    *,
    ref_stepper: Any,
    num_rollout_steps: int = 1,
    **options: Any,
) -> Trainer:
    """A `Trainer` of the `DivertedChain` configuration.

    Args:
        data: Trajectories, of which single times serve as initial conditions.
        ref_stepper: The reference, differentiable unless `cut_div_chain`.
        num_rollout_steps: Number T of rollout steps.
        **options: Those of `DivertedChain` and of `Trainer`.

    Returns:
        The trainer.

    Raises:
        ValueError: As `DivertedChain` and `Trainer`.

    Example:
        >>> import jax
        >>> import optax
        >>> import trainax_pk as tx
        >>> trainer = tx.trainer.DivertedChainTrainer(
        ...     tx.sample_data.lorenz_rk4(2, temporal_horizon=9, key=jax.random.key(0)),
        ...     ref_stepper=tx.sample_data.make_lorenz_stepper_rk4(),
        ...     num_rollout_steps=3, num_branch_steps=2, optimizer=optax.adam(1e-2),
        ...     num_training_steps=10, batch_size=4,
        ... )
        >>> trainer.configuration.num_branch_steps
        2
    """
    chosen, rest = _split(options)
    configuration = DivertedChain(num_rollout_steps, ref_stepper=ref_stepper, **chosen)
    return Trainer(data, configuration, **rest)


def DivertedChainBranchOneTrainer(  # noqa: N802
    data: Trajectories | PyTree[Array],
    *,
    ref_stepper: Any,
    num_rollout_steps: int = 1,
    **options: Any,
) -> Trainer:
    """A `Trainer` of the `DivertedChainBranchOne` configuration.

    Args:
        data: Trajectories, of which single times serve as initial conditions.
        ref_stepper: The reference, differentiable unless `cut_div_chain`.
        num_rollout_steps: Number T of rollout steps.
        **options: Those of `DivertedChainBranchOne` and of `Trainer`.

    Returns:
        The trainer.

    Raises:
        ValueError: As `DivertedChain` and `Trainer`.

    Example:
        >>> import jax
        >>> import optax
        >>> import trainax_pk as tx
        >>> trainer = tx.trainer.DivertedChainBranchOneTrainer(
        ...     tx.sample_data.lorenz_rk4(2, temporal_horizon=9, key=jax.random.key(0)),
        ...     ref_stepper=tx.sample_data.make_lorenz_stepper_rk4(),
        ...     num_rollout_steps=3, optimizer=optax.adam(1e-2),
        ...     num_training_steps=10, batch_size=4,
        ... )
        >>> trainer.configuration.num_branch_steps
        1
    """
    return DivertedChainTrainer(
        data,
        ref_stepper=ref_stepper,
        num_rollout_steps=num_rollout_steps,
        num_branch_steps=1,
        **options,
    )


def MixChainTrainer(  # noqa: N802
    data: Trajectories | PyTree[Array],
    *,
    ref_stepper: Any,
    num_rollout_steps: int = 1,
    **options: Any,
) -> Trainer:
    """A `Trainer` of the `MixChainPostPhysics` configuration.

    Args:
        data: Trajectories, leaves `(num_samples, num_times, ...)`.
        ref_stepper: The physics that runs after the model, differentiable.
        num_rollout_steps: Number T of model steps.
        **options: Those of `MixChainPostPhysics` and of `Trainer`.

    Returns:
        The trainer.

    Raises:
        ValueError: As `MixChainPostPhysics` and `Trainer`.

    Example:
        >>> import jax
        >>> import optax
        >>> import trainax_pk as tx
        >>> trainer = tx.trainer.MixChainTrainer(
        ...     tx.sample_data.lorenz_rk4(2, temporal_horizon=9, key=jax.random.key(0)),
        ...     ref_stepper=tx.sample_data.make_lorenz_stepper_rk4(),
        ...     num_post_physics_steps=2, optimizer=optax.adam(1e-2),
        ...     num_training_steps=10, batch_size=4,
        ... )
        >>> trainer.configuration.num_times
        4
    """
    chosen, rest = _split(options)
    configuration = MixChainPostPhysics(
        num_rollout_steps, ref_stepper=ref_stepper, **chosen
    )
    return Trainer(data, configuration, **rest)


def ResiduumTrainer(  # noqa: N802
    data: Trajectories | PyTree[Array],
    *,
    residuum_fn: Any,
    num_rollout_steps: int = 1,
    **options: Any,
) -> Trainer:
    """A `Trainer` of the `Residuum` configuration.

    Args:
        data: Trajectories, of which single times serve as initial conditions.
        residuum_fn: `(u_next, u_prev) -> residuum` of one sample.
        num_rollout_steps: Number T of rollout steps.
        **options: Those of `Residuum` and of `Trainer`.

    Returns:
        The trainer.

    Raises:
        ValueError: As `Residuum` and `Trainer`.

    Example:
        >>> import jax
        >>> import optax
        >>> import trainax_pk as tx
        >>> step = tx.sample_data.make_lorenz_stepper_rk4()
        >>> trainer = tx.trainer.ResiduumTrainer(
        ...     tx.sample_data.lorenz_rk4(2, temporal_horizon=9, key=jax.random.key(0)),
        ...     residuum_fn=lambda u_next, u_prev: u_next - step(u_prev),
        ...     optimizer=optax.adam(1e-2), num_training_steps=10, batch_size=4,
        ... )
        >>> trainer.configuration.num_rollout_steps
        1
    """
    chosen, rest = _split(options)
    configuration = Residuum(num_rollout_steps, residuum_fn=residuum_fn, **chosen)
    return Trainer(data, configuration, **rest)


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the configuration, and of the trainer."""
    chosen = {k: v for k, v in options.items() if k in _CONFIGURATION_OPTIONS}
    rest = {k: v for k, v in options.items() if k not in _CONFIGURATION_OPTIONS}
    return chosen, rest
