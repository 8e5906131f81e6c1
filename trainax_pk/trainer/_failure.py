"""What to say when training was not finite."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainax_pk import _tree
from trainax_pk.step import TrainState

# Shows the gradient as it is.
DESCENT = optax.sgd(1.0)
# Leaves that a message names.
_SHOWN = 8

stays_finite = jax.jit(_tree.stays_finite)


@jax.jit
def leave_out(state: TrainState) -> TrainState:
    """The state after an update that is left out: as the step itself would skip it."""
    return dataclasses.replace(
        state, step=state.step + 1, num_skipped=state.num_skipped + 1
    )


class Skips:
    """Counts updates in a row that were not finite.

    Attributes:
        limit: The most that are borne, or None.
        left_out: Updates with a finite gradient of which the optimizer made something
            that is not; records do not tell of them.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.left_out: list[int] = []
        self._in_a_row = 0

    def restore(
        self, series: Mapping[str, np.ndarray], left_out: Iterable[int]
    ) -> None:
        """Takes up what a run has behind it."""
        self.left_out = list(left_out)
        ok = _finite(series)
        ok[self.left_out] = False
        self._in_a_row = int(np.argmax(ok[::-1])) if ok.any() else len(ok)

    def see(
        self, start: int, series: Mapping[str, np.ndarray], *, kept: bool = True
    ) -> str | None:
        """Takes the records of a chunk; the message if there were too many.

        Args:
            start: Number of its first update.
            series: Records by name.
            kept: Whether the parameters after its last update are finite.
        """
        ok = _finite(series)
        if not kept:
            if ok[-1]:
                self.left_out.append(start + len(ok) - 1)
            ok[-1] = False
        if ok.all():
            self._in_a_row = 0
            return None
        for i, finite in enumerate(ok):
            self._in_a_row = 0 if finite else self._in_a_row + 1
            if self.limit is not None and self._in_a_row > self.limit:
                return (
                    f"Expected at most {self.limit} updates in a row that are not finite "
                    f"(max_skipped), got {self._in_a_row} up to update {start + i}. Lower "
                    "the learning rate, or pass max_grad_norm."
                )
        return None


def explain_failure(
    step: Callable[..., Any],
    descend: Callable[..., Any],
    unguarded: Callable[..., Any],
    state: TrainState,
    batch_at: Callable[[int], Any],
    indices_at: Callable[[int], Any],
    start: int,
    count: int,
) -> str | None:
    """Replays a chunk update by update and says where and in what it failed.

    Args:
        step: The train step, with the policy "raise".
        descend: The same without clipping and averages, by plain gradient descent at the
            rate 1, which leaves what is not finite where it comes up.
        unguarded: The train step, with the policy "ignore".
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
    # Those that were left out before, under another policy, are no failures here.
    none = jnp.zeros_like(state.num_skipped)
    state = dataclasses.replace(state, num_skipped=none)
    for i in range(start, start + count):
        new, info = step(state, batch_at(i))
        if bool(info.skipped):
            args = (i, info, state, batch_at(i), indices_at(i))
            if bool(jnp.isfinite(info.loss) & jnp.isfinite(info.grad_norm)):
                new, _ = jax.jit(unguarded)(state, batch_at(i))
                return _message(
                    *args, _not_finite(new.params), "what the optimizer makes"
                )
            leaves = _bad_gradients(descend, state, batch_at(i))
            return _message(*args, leaves, "the gradient")
        state = new
    return None


def explain_params(params: Any, start: int, count: int) -> str:
    """The message where parameters were not finite after a chunk, and no update fails
    when it is repeated alone.

    Args:
        params: After the chunk.
        start: First update of the chunk.
        count: Number of its updates.
    """
    return (
        f"Expected finite parameters, got {_names(_not_finite(params))} that are not after "
        f"the updates {start} to {start + count - 1}; losses and gradients were finite. "
        "Lower the learning rate, look at the optimizer, or pass nonfinite='skip'."
    )


def _finite(series: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.logical_and.reduce([np.isfinite(x) for x in series.values()])


def _bad_gradients(
    descend: Callable[..., Any], state: TrainState, batch: Any
) -> list[str]:
    start = dataclasses.replace(
        state, opt_state=DESCENT.init(state.params), ema=None, more_ema=()
    )
    return _not_finite(jax.jit(descend)(start, batch)[0].params)


def _not_finite(tree: Any) -> list[str]:
    """Paths of leaves with NaN or infinity."""
    return [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.all(jnp.isfinite(x)))
    ]


def _message(
    i: int,
    info: Any,
    state: TrainState,
    batch: Any,
    indices: Any,
    leaves: list[str],
    what: str,
) -> str:
    bad, count = _not_finite(batch), len(jax.tree.leaves(state.params))
    large = max(
        float(jnp.max(jnp.abs(x))) if x.size else 0.0
        for x in jax.tree.leaves(state.params)
    )
    where = f"its batch holds NaN or infinity in {bad}; " if bad else ""
    if leaves:
        which = "all" if len(leaves) == count else f"{len(leaves)} of {count}"
        where += f"{what} is not finite in {which} leaves ({_names(leaves)}); "
    return (
        f"Expected finite losses, gradients and updates, got loss {float(info.loss)} and "
        f"gradient norm {float(info.grad_norm)} at update {i} (windows "
        f"{np.asarray(indices).tolist()}); {where}the largest parameter was {large:.3g}. "
        "Lower the learning rate, pass max_grad_norm, or nonfinite='skip'."
    )


def _names(leaves: list[str]) -> str:
    return ", ".join([*leaves[:_SHOWN], *(["..."] if len(leaves) > _SHOWN else [])])
