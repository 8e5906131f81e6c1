"""trainax's windows and its order of minibatches."""

import functools
import math
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from trainax_pk._tree import check_count


class TrajectorySubStacker(eqx.Module):
    """Windows of trajectories by index; nothing is copied until it is asked for.

    Attributes:
        data_trajectories: Leaves `(num_samples, trj_len, ...)`.
        num_total_samples: Number of windows.
        sub_trajectory_len: Times in a window (1 if only initial conditions are stored).
        num_windows: Windows of one trajectory.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.compat as tx
        >>> stacker = tx.TrajectorySubStacker(jnp.ones((4, 10, 1, 30)), 3)
        >>> stacker.num_total_samples, stacker(jnp.array([0, 7])).shape
        (32, (2, 3, 1, 30))
    """

    data_trajectories: PyTree[Array]
    num_total_samples: int = eqx.field(static=True)
    sub_trajectory_len: int = eqx.field(static=True)
    num_windows: int = eqx.field(static=True)

    def __init__(
        self,
        data_trajectories: PyTree[Array],
        sub_trajectory_len: int,
        *,
        do_sub_stacking: bool = True,
        only_store_ic: bool = False,
    ) -> None:
        check_count("sub_trajectory_len", sub_trajectory_len)
        leading = {jnp.shape(x)[:2] for x in jax.tree.leaves(data_trajectories)}
        if len(leading) != 1 or len(next(iter(leading))) != 2:
            raise ValueError(
                "Expected leaves with the same two leading axes (num_samples, trj_len),"
                f" got {sorted(leading)}. Check the trajectories."
            )
        num_samples, trj_len = next(iter(leading))
        if sub_trajectory_len > trj_len:
            raise ValueError(
                f"Expected windows of at most the trajectories' {trj_len} times, got "
                f"{sub_trajectory_len}. Shorten the rollout."
            )
        self.data_trajectories = jax.tree.map(jnp.asarray, data_trajectories)
        self.num_windows = trj_len - sub_trajectory_len + 1 if do_sub_stacking else 1
        self.num_total_samples = num_samples * self.num_windows
        self.sub_trajectory_len = 1 if only_store_ic else sub_trajectory_len

    @property
    def data_sub_trajectories(self) -> PyTree[Array]:
        """All windows stacked, `(num_total_samples, sub_trajectory_len, ...)`."""
        return self(jnp.arange(self.num_total_samples))

    def __call__(self, indices: Int[Array, " B"] | slice) -> PyTree[Array]:
        """Windows `(B, sub_trajectory_len, ...)`; `indices` as arrays take them."""
        if isinstance(indices, list | tuple):
            indices = jnp.asarray(indices)
        return self.windows(jnp.arange(self.num_total_samples)[indices])

    def windows(self, indices: Int[Array, " B"]) -> PyTree[Array]:
        """As a call, for indices in `0 … num_total_samples - 1`."""
        sample, start = indices // self.num_windows, indices % self.num_windows
        offsets = jnp.arange(self.sub_trajectory_len)
        times = start[..., None] + jnp.expand_dims(offsets, range(start.ndim))
        sample = sample[..., None]
        return jax.tree.map(lambda x: x[sample, times], self.data_trajectories)


class PermutationMixer(eqx.Module):
    """Indices of minibatches: a permutation per epoch; the last batch is the remainder.

    Attributes:
        permutations: `(num_epochs, num_total_samples)`.
        batch_size: Not larger than the number of samples.

    Example:
        >>> import jax
        >>> import trainax_pk.compat as tx
        >>> mixer = tx.PermutationMixer(10, 6, 4, jax.random.key(0))
        >>> [len(mixer(i)) for i in range(3)]
        [4, 4, 2]
    """

    num_total_samples: int = eqx.field(static=True)
    num_minibatches: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    num_minibatches_per_epoch: int = eqx.field(static=True)
    num_epochs: int = eqx.field(static=True)
    permutations: Int[Array, "num_epochs num_total_samples"]

    def __init__(
        self,
        num_total_samples: int,
        num_minibatches: int,
        batch_size: int,
        shuffle_key: PRNGKeyArray,
    ) -> None:
        check_count("num_minibatches", num_minibatches, minimum=0)
        check_count("batch_size", batch_size)
        if num_total_samples < batch_size:
            warnings.warn(
                f"batch size {batch_size} is larger than the total number of samples "
                f"{num_total_samples}; training on full batches.",
                stacklevel=2,
            )
            batch_size = num_total_samples
        self.num_total_samples = num_total_samples
        self.num_minibatches = num_minibatches
        self.batch_size = batch_size
        self.num_minibatches_per_epoch = math.ceil(num_total_samples / batch_size)
        self.num_epochs = math.ceil(num_minibatches / self.num_minibatches_per_epoch)
        self.permutations = _permutations(
            shuffle_key, num_total_samples, self.num_epochs
        )

    def __call__(self, i: int, *, return_info: bool = False) -> Any:
        """Indices of minibatch i, and with `return_info` its epoch and place in it."""
        if i >= self.num_minibatches:
            raise ValueError(
                f"Expected a batch index below {self.num_minibatches}, got {i}. "
                "Build the mixer with more minibatches."
            )
        epoch, place = divmod(i, self.num_minibatches_per_epoch)
        stop = min((place + 1) * self.batch_size, self.num_total_samples)
        indices = self.permutations[epoch, place * self.batch_size : stop]
        return (indices, (epoch, place)) if return_info else indices


class EpochOrder(eqx.Module):
    """The mixer's order for compiled programs: batches of one size, by update.

    Attributes:
        permutations: `(num_epochs, num_total_samples)`.
        batch_size: Of these batches: the full size, or that of the remainder.
        full_size: Distance between the batches' first places in an epoch.
        per_epoch: Number of batches in an epoch.
    """

    permutations: Int[Array, "num_epochs num_total_samples"]
    batch_size: int = eqx.field(static=True)
    full_size: int = eqx.field(static=True)
    per_epoch: int = eqx.field(static=True)

    def indices(self, start: Array, n: int) -> Int[Array, "n B"]:
        """Indices of updates `start … start + n - 1`, none of another size."""
        steps = start + jnp.arange(n)
        epoch, place = steps // self.per_epoch, steps % self.per_epoch
        columns = place[:, None] * self.full_size + jnp.arange(self.batch_size)[None]
        return self.permutations[epoch[:, None], columns].astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _permutations(key: PRNGKeyArray, count: int, epochs: int) -> Int[Array, "e n"]:
    # The key of the next epoch is the first half of a split, as trainax draws it.
    def body(key: PRNGKeyArray, _: None) -> tuple[PRNGKeyArray, Array]:
        return jax.random.split(key)[0], jax.random.permutation(key, count)

    return jax.lax.scan(body, key, None, length=epochs)[1]
