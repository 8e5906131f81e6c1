"""trainax's trainers, each a `GeneralTrainer` with its configuration."""

from typing import Any

import optax
from jaxtyping import Array, Float, PyTree

from trainax_pk.compat import configuration
from trainax_pk.compat._general_trainer import GeneralTrainer
from trainax_pk.compat._mixer import TrajectorySubStacker
from trainax_pk.compat.loss import BaseLoss, MSELoss


class SupervisedTrainer(GeneralTrainer):
    """Supervised rollout training.

    Example:
        >>> import jax
        >>> import optax
        >>> import trainax_pk.compat as tx
        >>> trainer = tx.trainer.SupervisedTrainer(
        ...     tx.sample_data.advection_1d_periodic(key=jax.random.PRNGKey(0)),
        ...     num_rollout_steps=5, optimizer=optax.adam(1e-2),
        ...     num_training_steps=1000, batch_size=32,
        ... )
        >>> trainer.trajectory_sub_stacker.num_total_samples
        1900
    """

    def __init__(
        self,
        data_trajectories: PyTree[Array],
        *,
        ref_stepper: Any = None,
        residuum_fn: Any = None,
        optimizer: optax.GradientTransformation,
        callback_fn: Any = None,
        num_training_steps: int,
        batch_size: int,
        num_rollout_steps: int = 1,
        time_level_loss: BaseLoss = MSELoss(),
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        time_level_weights: Float[Array, " T"] | None = None,
        do_sub_stacking: bool = True,
    ) -> None:
        super().__init__(
            TrajectorySubStacker(
                data_trajectories,
                num_rollout_steps + 1,
                do_sub_stacking=do_sub_stacking,
            ),
            configuration.Supervised(
                num_rollout_steps,
                time_level_loss=time_level_loss,
                cut_bptt=cut_bptt,
                cut_bptt_every=cut_bptt_every,
                time_level_weights=time_level_weights,
            ),
            ref_stepper=ref_stepper,
            residuum_fn=residuum_fn,
            optimizer=optimizer,
            num_minibatches=num_training_steps,
            batch_size=batch_size,
            callback_fn=callback_fn,
        )


class DivertedChainBranchOneTrainer(GeneralTrainer):
    """Diverted chain training with branches of one step.

    Example:
        >>> import jax
        >>> import optax
        >>> import trainax_pk.compat as tx
        >>> trainer = tx.trainer.DivertedChainBranchOneTrainer(
        ...     tx.sample_data.lorenz_rk4(2, temporal_horizon=9, key=jax.random.key(0)),
        ...     ref_stepper=tx.sample_data.make_lorenz_stepper_rk4(),
        ...     optimizer=optax.adam(1e-2), num_training_steps=10, batch_size=4,
        ... )
        >>> trainer.trajectory_sub_stacker.num_total_samples
        16
    """

    def __init__(
        self,
        data_trajectories: PyTree[Array],
        *,
        ref_stepper: Any,
        residuum_fn: Any = None,
        optimizer: optax.GradientTransformation,
        callback_fn: Any = None,
        num_training_steps: int,
        batch_size: int,
        num_rollout_steps: int = 1,
        time_level_loss: BaseLoss = MSELoss(),
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        cut_div_chain: bool = False,
        time_level_weights: Float[Array, " T"] | None = None,
        do_sub_stacking: bool = True,
    ) -> None:
        super().__init__(
            TrajectorySubStacker(
                data_trajectories,
                num_rollout_steps + 1,
                do_sub_stacking=do_sub_stacking,
                only_store_ic=True,
            ),
            configuration.DivertedChainBranchOne(
                num_rollout_steps,
                time_level_loss=time_level_loss,
                cut_bptt=cut_bptt,
                cut_bptt_every=cut_bptt_every,
                cut_div_chain=cut_div_chain,
                time_level_weights=time_level_weights,
            ),
            ref_stepper=ref_stepper,
            residuum_fn=residuum_fn,
            optimizer=optimizer,
            num_minibatches=num_training_steps,
            batch_size=batch_size,
            callback_fn=callback_fn,
        )


class ResiduumTrainer(GeneralTrainer):
    """Residuum rollout training.

    Example:
        >>> import jax
        >>> import optax
        >>> import trainax_pk.compat as tx
        >>> trainer = tx.trainer.ResiduumTrainer(
        ...     tx.sample_data.lorenz_rk4(2, temporal_horizon=9, key=jax.random.key(0)),
        ...     residuum_fn=lambda u_next, u_prev: u_next - u_prev,
        ...     optimizer=optax.adam(1e-2), num_training_steps=10, batch_size=4,
        ... )
        >>> trainer.loss_configuration.cut_prev
        False
    """

    def __init__(
        self,
        data_trajectories: PyTree[Array],
        *,
        ref_stepper: Any = None,
        residuum_fn: Any,
        optimizer: optax.GradientTransformation,
        callback_fn: Any = None,
        num_training_steps: int,
        batch_size: int,
        num_rollout_steps: int = 1,
        time_level_loss: BaseLoss = MSELoss(),
        cut_bptt: bool = False,
        cut_bptt_every: int = 1,
        cut_prev: bool = False,
        cut_next: bool = False,
        time_level_weights: Float[Array, " T"] | None = None,
        do_sub_stacking: bool = True,
    ) -> None:
        super().__init__(
            TrajectorySubStacker(
                data_trajectories,
                num_rollout_steps + 1,
                do_sub_stacking=do_sub_stacking,
            ),
            configuration.Residuum(
                num_rollout_steps,
                time_level_loss=time_level_loss,
                cut_bptt=cut_bptt,
                cut_bptt_every=cut_bptt_every,
                cut_prev=cut_prev,
                cut_next=cut_next,
                time_level_weights=time_level_weights,
            ),
            ref_stepper=ref_stepper,
            residuum_fn=residuum_fn,
            optimizer=optimizer,
            num_minibatches=num_training_steps,
            batch_size=batch_size,
            callback_fn=callback_fn,
        )


__all__ = ["DivertedChainBranchOneTrainer", "ResiduumTrainer", "SupervisedTrainer"]
