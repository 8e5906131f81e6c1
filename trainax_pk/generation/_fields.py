"""Fields that are generated, and what they are generated from."""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from trainax_pk._tree import as_lengths, check_count, check_flag, is_concrete


class Fields(eqx.Module):
    """Samples of fields with what was known of each: what generative models train on.

    `tx.data.Samples(fields)` hands them to a trainer.

    Attributes:
        target: Fields, `(N, C, *space)` with one or more axes of space.
        condition: What was known, a PyTree of `(N, C_i, *space_i)` on the grid of the
            target or on coarser ones whose points divide it; None for nothing.

    Raises:
        ValueError: A target that is no field or not floating, conditions of another
            number of samples or axes, a grid that does not divide the target's, entries
            that are not finite. Messages hold the first index.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> fine, coarse = jnp.ones((6, 1, 16, 16)), jnp.ones((6, 1, 4, 4))
        >>> len(tx.data.Samples(tx.generation.Fields(fine, coarse)))
        6
    """

    target: Float[Array, "N C ..."]
    condition: PyTree[Array] | None
    rows_are_samples: ClassVar[bool] = True

    def __init__(self, target: Any, condition: Any = None) -> None:
        """Checks and keeps the arrays.

        Args:
            target: `(N, C, *space)`.
            condition: Leaves `(N, C_i, *space_i)`, or None.
        """
        self.target, self.condition = target, condition
        check_fields(target, condition)
        named = [("target", target)]
        named += [
            (f"condition{jax.tree_util.keystr(path)}", leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(condition)
        ]
        for name, leaf in named:
            if not isinstance(leaf, jax.ShapeDtypeStruct) and is_concrete(leaf):
                _check_finite(name, np.asarray(leaf))


def as_fields(batch: Any) -> tuple[Array, PyTree[Array] | None]:
    """Target and condition of a batch.

    Args:
        batch: `Fields`, a tuple (target, condition), or the target alone.

    Returns:
        Target `(B, C, *space)`, and the condition, leaves `(B, C_i, *space_i)`, or None.

    Raises:
        ValueError: Anything else, and shapes that `Fields` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.generation import as_fields
        >>> target, condition = as_fields(jnp.ones((4, 1, 8)))
        >>> target.shape, condition
        ((4, 1, 8), None)
    """
    if isinstance(batch, Fields):
        _check_some(batch.target)
        return batch.target, batch.condition
    if isinstance(batch, tuple) and len(batch) == 2:
        target, condition = batch
    else:
        target, condition = batch, None
    check_fields(target, condition)
    return target, condition


def check_fields(target: Any, condition: Any) -> None:
    """Shapes and dtype of fields with a sample axis, or a ValueError."""
    shape = getattr(target, "shape", None)
    if shape is None or len(shape) < 3:
        raise ValueError(
            "Expected fields (samples, channels, *space) as target, got "
            f"{type(target).__name__}{'' if shape is None else f' of the shape {shape}'}. "
            "Pass tx.generation.Fields(target, condition), a tuple (target, condition), "
            "or an array."
        )
    if not jnp.issubdtype(target.dtype, jnp.floating):
        raise ValueError(
            f"Expected real fields, got {target.dtype}. Convert them with "
            "jnp.asarray(x, float)."
        )
    _check_some(target)
    for path, leaf in jax.tree_util.tree_leaves_with_path(condition):
        name = f"condition{jax.tree_util.keystr(path)}"
        if jnp.shape(leaf)[:1] != shape[:1]:
            raise ValueError(
                f"Expected {name} of {shape[0]} samples, as the target has, got the "
                f"shape {jnp.shape(leaf)}. Row i of it is what row i of the target is "
                "generated from."
            )
        check_grid(name, jnp.shape(leaf)[1:], shape[2:])


def _check_some(target: Any) -> None:
    """At least one sample, or a ValueError."""
    if not target.shape[0]:
        raise ValueError(
            f"Expected at least one field, got 0 samples (shape {target.shape}). Pass some."
        )


def check_grid(name: str, shape: tuple[int, ...], space: tuple[int, ...]) -> None:
    """A field `(C, *coarse)` whose points divide a grid, or a ValueError."""
    coarse = shape[1:]
    fits = len(coarse) == len(space) and all(
        n and m % n == 0 for n, m in zip(coarse, space, strict=True)
    )
    if not fits:
        raise ValueError(
            f"Expected {name} (channels, *space) on a grid that divides {space}, got the "
            f"shape {shape}. Pass it on the grid of the target, or average it over "
            "blocks of one size."
        )


def _check_finite(name: str, values: np.ndarray) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"Expected finite fields, got {values[bad][0]} at index {first} of {name} "
            f"({bad.sum()} such entries). Leave these samples out."
        )


def coarsen(field: Float[Array, "C *space"], factor: int) -> Float[Array, "C *coarse"]:
    """Means over blocks of `factor` points along each axis.

    Args:
        field: One field.
        factor: Points of a block's side.

    Returns:
        `(C, *(space / factor))`.

    Raises:
        ValueError: A factor below 1, or one that does not divide the grid.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.generation import coarsen
        >>> coarsen(jnp.array([[1.0, 3.0, 5.0, 9.0]]), 2)
        Array([[2., 7.]], dtype=float32)
    """
    check_count("factor", factor)
    space = field.shape[1:]
    if not space or any(n % factor for n in space):
        raise ValueError(
            f"Expected a field (channels, *space) whose axes are multiples of {factor} "
            f"points, got the shape {field.shape}. Pass another factor."
        )
    split = [n for m in space for n in (m // factor, factor)]
    blocks = field.reshape(field.shape[0], *split)
    return jnp.mean(blocks, axis=tuple(range(2, blocks.ndim, 2)))


def upsample(
    field: Float[Array, "C *coarse"],
    space: Sequence[int],
    *,
    periodic: bool = True,
) -> Float[Array, "C *space"]:
    """Linear interpolation to a finer grid: of means over blocks, at their centres.

    In one dimension linear, in two bilinear. A value stands at the centre of its block,
    so that the mean field keeps its place.

    Args:
        field: One field.
        space: Points of the finer grid, multiples of the coarser one's.
        periodic: Whether the domain is; else values are constant beyond the outermost
            centres.

    Returns:
        `(C, *space)`, floating.

    Raises:
        ValueError: A grid that the field's does not divide.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.generation import upsample
        >>> upsample(jnp.array([[0.0, 4.0]]), (4,)).tolist()
        [[1.0, 1.0, 3.0, 3.0]]
    """
    check_flag("periodic", periodic)
    lengths = as_lengths(space)
    if lengths is None:
        raise ValueError(
            f"Expected `space` to be a tuple of points along each axis, got {space!r}. "
            "Pass for example space=(32, 32)."
        )
    space = tuple(check_count("space", n) for n in lengths)
    check_grid("a field", field.shape, space)
    if not jnp.issubdtype(field.dtype, jnp.floating):
        field = field.astype(jnp.result_type(float))
    for axis, points in enumerate(space, start=1):
        count = field.shape[axis]
        if count == points:
            continue
        # Places of the fine centres between the coarse ones.
        place = (np.arange(points) + 0.5) * count / points - 0.5
        low = np.floor(place).astype(int)
        share = (place - low).astype(field.dtype)
        rows = (low, low + 1)
        if periodic:
            rows = tuple(r % count for r in rows)
        else:
            rows = tuple(np.clip(r, 0, count - 1) for r in rows)
        weight = share.reshape([-1 if i == axis else 1 for i in range(field.ndim)])
        left, right = (jnp.take(field, r, axis=axis) for r in rows)
        field = left + weight * (right - left)
    return field
