"""trainax's trainer over the engine."""

from typing import Any

import equinox as eqx
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from tqdm.auto import tqdm

from trainax_pk._tree import check_count
from trainax_pk.compat._mixer import PermutationMixer, TrajectorySubStacker
from trainax_pk.compat._run import CompiledRun, EagerRun
from trainax_pk.compat.configuration import BaseConfiguration


class GeneralTrainer(eqx.Module):
    """Trains a stepper on windows with a configuration; the call signature of trainax.

    The return type depends on the flags, as there: `stepper`, then the loss history
    unless `return_loss_history=False`, then the callback's results if there is one.

    Windows from a `TrajectorySubStacker` are gathered inside compiled chunks of updates.
    Any other `indices -> windows`, which may read files or draw noise, is called from
    Python before every update, as in trainax, and is as slow as there. A subclass may
    override `step_fn`; what it computes is what the chunks repeat.

    Attributes:
        trajectory_sub_stacker: `indices -> windows`, with `num_total_samples`.
        loss_configuration: The configuration.
        ref_stepper: Reference that the configuration may need.
        residuum_fn: Residuum that it may need.
        optimizer: An optax transformation.
        num_minibatches: Number of updates.
        batch_size: Windows per update; the last batch of an epoch is the remainder.
        callback_fn: `(update_i, stepper, data) -> dict`, before every update.

    Example:
        >>> import jax
        >>> import optax
        >>> import trainax_pk.compat as tx
        >>> data = tx.sample_data.advection_1d_periodic(key=jax.random.PRNGKey(0))
        >>> trainer = tx.GeneralTrainer(
        ...     tx.TrajectorySubStacker(data, 2), tx.configuration.Supervised(),
        ...     optimizer=optax.adam(1e-2), num_minibatches=10, batch_size=32,
        ... )
        >>> trainer.trajectory_sub_stacker.num_total_samples
        1980
    """

    trajectory_sub_stacker: Any
    loss_configuration: BaseConfiguration
    ref_stepper: Any
    residuum_fn: Any
    optimizer: optax.GradientTransformation
    num_minibatches: int
    batch_size: int
    callback_fn: Any

    def __init__(
        self,
        trajectory_sub_stacker: Any,
        loss_configuration: BaseConfiguration,
        *,
        ref_stepper: Any = None,
        residuum_fn: Any = None,
        optimizer: optax.GradientTransformation,
        num_minibatches: int,
        batch_size: int,
        callback_fn: Any = None,
    ) -> None:
        self.trajectory_sub_stacker = trajectory_sub_stacker
        self.loss_configuration = loss_configuration
        self.ref_stepper = ref_stepper
        self.residuum_fn = residuum_fn
        self.optimizer = optimizer
        self.num_minibatches = num_minibatches
        self.batch_size = batch_size
        self.callback_fn = callback_fn

    def full_loss(self, stepper: Any) -> Float[Array, ""]:
        """Loss on all windows at once, which are stacked for it."""
        return self._loss(stepper, self.trajectory_sub_stacker.data_sub_trajectories)

    def step_fn(
        self, stepper: Any, opt_state: Any, data: PyTree[Array]
    ) -> tuple[Any, Any, Float[Array, ""]]:
        """One update: `(stepper, opt_state, loss)`.

        Complex leaves descend along JAX's gradient, which is not conjugated, as in
        trainax; `trainax_pk.make_train_step` conjugates it.
        """
        loss, grad = eqx.filter_value_and_grad(lambda m: self._loss(m, data))(stepper)
        params = eqx.filter(stepper, eqx.is_inexact_array)
        updates, opt_state = self.optimizer.update(grad, opt_state, params)
        return eqx.apply_updates(stepper, updates), opt_state, loss

    def __call__(
        self,
        stepper: Any,
        key: PRNGKeyArray,
        opt_state: Any = None,
        *,
        return_loss_history: bool = True,
        record_loss_every: int = 1,
        spawn_tqdm: bool = True,
    ) -> Any:
        """Trains the stepper; see the class for what is returned."""
        check_count("record_loss_every", record_loss_every)
        mixer = PermutationMixer(
            self.trajectory_sub_stacker.num_total_samples,
            self.num_minibatches,
            self.batch_size,
            key,
        )
        gather = type(self.trajectory_sub_stacker).__call__
        is_ours = gather is TrajectorySubStacker.__call__
        run = (CompiledRun if is_ours else EagerRun)(self, mixer)
        # Not `disable=False`, which would overrule the user's TQDM_DISABLE.
        silent = {} if spawn_tqdm else {"disable": True}
        with tqdm(
            total=mixer.num_minibatches, desc=f"E: {0:05d}, B: {0:05d}", **silent
        ) as bar:
            stepper, losses, aux = run(stepper, opt_state, bar)
        results = [stepper]
        if return_loss_history:
            results.append(losses[::record_loss_every])
        if self.callback_fn is not None:
            results.append(aux)
        return tuple(results) if len(results) > 1 else results[0]

    def _loss(self, stepper: Any, data: PyTree[Array]) -> Float[Array, ""]:
        return self.loss_configuration(
            stepper, data, ref_stepper=self.ref_stepper, residuum_fn=self.residuum_fn
        )
