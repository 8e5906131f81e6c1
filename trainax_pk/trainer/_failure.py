"""What to say when training was not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainax_pk.step import TrainState


def explain_failure(
    step: Callable[..., Any],
    state: TrainState,
    batch_at: Callable[[int], Any],
    indices_at: Callable[[int], Any],
    start: int,
    count: int,
) -> str | None:
    """Replays a chunk update by update and says where and in what it failed.

    Args:
        step: The train step, with the policy "raise".
        state: State before the chunk.
        batch_at: Batch of an update.
        indices_at: Window indices of an update.
        start: First update of the chunk.
        count: Number of its updates.

    Returns:
        The message: number of the update, loss, leaves and windows; None if no update
        fails when it is repeated.
    """
    step = jax.jit(step)
    for i in range(start, start + count):
        new, info = step(state, batch_at(i))
        if bool(info.skipped):
            return _message(i, info, state, batch_at(i), indices_at(i))
        state = new
    return None


def _message(i: int, info: Any, state: TrainState, batch: Any, indices: Any) -> str:
    bad = [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(batch)
        if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.all(jnp.isfinite(x)))
    ]
    large = max(
        float(jnp.max(jnp.abs(x))) if x.size else 0.0
        for x in jax.tree.leaves(state.params)
    )
    where = f"its batch holds NaN or infinity in {bad}; " if bad else ""
    return (
        f"Expected finite losses and gradients, got loss {float(info.loss)} and "
        f"gradient norm {float(info.grad_norm)} at update {i} (windows "
        f"{np.asarray(indices).tolist()}); {where}the largest parameter was {large:.3g}. "
        "Lower the learning rate, pass max_grad_norm, or nonfinite='skip'."
    )
