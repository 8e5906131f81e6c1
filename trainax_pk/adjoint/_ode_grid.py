"""Fixed steps, and which of them save times fall on."""

import math
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from trainax_pk._tree import is_concrete


class Grid(NamedTuple):
    """Ends of fixed steps.

    Attributes:
        times: `(num_steps + 1,)`, in the precision of the solve.
        num_steps: Number of steps.
    """

    times: np.ndarray
    num_steps: int

    @property
    def sign(self) -> float:
        """1 if time increases, -1 if it decreases."""
        return -1.0 if self.times[-1] < self.times[0] else 1.0


def fixed_grid(
    t0: Any, t1: Any, dt0: Any, saveat: diffrax.SaveAt, max_steps: int | None
) -> Grid | None:
    """The steps that a constant step size takes, or None where they are not known."""
    given = (t0, t1, dt0)
    if dt0 is None or not all(is_concrete(t) for t in given):
        return None
    if any(jnp.iscomplexobj(t) for t in given):
        raise ValueError(f"Expected real times, got {t0=}, {t1=}, {dt0=}.")
    start, end, size = (float(t) for t in given)
    if size == 0 or (end - start) * size < 0 or not math.isfinite(end - start + size):
        raise ValueError(
            f"Expected steps that lead from t0 to t1, got {t0=}, {t1=}, {dt0=}. Pass a "
            "`dt0` of the sign of t1 - t0."
        )
    ratio = (end - start) / size
    # A last step of a millionth of the others is rounding, not a step.
    count = round(ratio) if abs(ratio - round(ratio)) < 1e-6 else math.ceil(ratio)
    if max_steps is not None and count > max_steps:
        raise ValueError(
            f"Expected at most max_steps={max_steps} steps, got {count} from {t0=}, "
            f"{t1=}, {dt0=}. Pass a larger `max_steps` or a larger `dt0`."
        )
    times = np.linspace(start, end, count + 1)
    return Grid(times.astype(_time_dtype(given, saveat)), count)


def on_grid(ts: Any, grid: Grid) -> np.ndarray | None:
    """Index of the step that ends at each time, or None if one lies between steps."""
    if not is_concrete(ts):
        return None
    ts = np.asarray(ts, np.float64)
    times = grid.times.astype(np.float64)
    nearest = np.abs(ts[:, None] - times[None, :]).argmin(axis=1)
    # Save times and steps are rounded apart from one another.
    near = 8 * np.finfo(grid.times.dtype).eps * np.abs(times).max()
    return nearest if (np.abs(ts - times[nearest]) <= near).all() else None


def _time_dtype(given: tuple[Any, ...], saveat: diffrax.SaveAt) -> np.dtype:
    is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)  # noqa: E731
    subs = jax.tree.leaves(saveat.subs, is_leaf=is_sub)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*given, *(s.ts for s in subs if s.ts is not None))
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
