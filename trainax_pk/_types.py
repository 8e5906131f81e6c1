"""Shapes and containers that every layer shares."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree


class Inputs(NamedTuple):
    """What a conditioned stepper receives beside the state, for one sample.

    Attributes:
        sample: Constitutive parameters of the trajectory, leaves `(...)`, or None.
        time: Forcing at the time of the state that is stepped, leaves `(...)`, or
            None. A stepper that returns `m` times at once receives the `m` forcings
            of the times that it starts from, leaves `(m, ...)`.
    """

    sample: PyTree[Array] | None = None
    time: PyTree[Array] | None = None


class Window(eqx.Module):
    """A batch of windows: `L` consecutive times of `B` samples.

    Attributes:
        state: Leaves `(B, L, ...)`. Index 0 is the initial condition.
        sample: Leaves `(B, ...)`: parameters that belong to a trajectory, or None.
        time: Leaves `(B, L, ...)`: forcing that belongs to a time, or None.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk import Window
        >>> Window(jnp.zeros((4, 3, 1, 30))).num_times
        3
    """

    state: PyTree[Any]
    sample: PyTree[Any] | None = None
    time: PyTree[Any] | None = None

    @property
    def num_times(self) -> int:
        """Length `L` of the window."""
        return _leading(self.state, 1)

    @property
    def batch_size(self) -> int:
        """Number `B` of windows."""
        return _leading(self.state, 0)


def _leading(tree: PyTree[Any], axis: int) -> int:
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(
            "Expected a batch with at least one array leaf, got none. "
            "Pass an array or a PyTree of arrays with leaves (B, L, ...)."
        )
    return leaves[0].shape[axis]
