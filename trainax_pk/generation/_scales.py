"""Between fields in their own units and what a network sees."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from trainax_pk._tree import as_lengths, check_count, check_flag
from trainax_pk.amortized._scale import Standardisation, fit_standardisation
from trainax_pk.generation._fields import as_fields, check_grid, upsample


class FieldScales(eqx.Module):
    """Standardised fields and conditions, channel by channel; nothing in it trains.

    z = (u − base − mean) / std. The condition's leaves are interpolated to the grid of u
    and stacked in the order of `jax.tree.leaves`; base is 0, or with `residual` the first
    C of these channels: a coarse field, or the present state.

    Attributes:
        num_channels: C.
        num_condition_channels: Of all leaves of the condition together; 0 for none.
        num_axes: Axes of space.
        residual: Whether the condition's first channels are subtracted.
        periodic: Whether the domain is, for the interpolation of coarser conditions.
        target_scale: Of the target, `(C, 1, ...)`.
        condition_scale: Of the condition's channels.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> scales = tx.generation.FieldScales(1, 1, num_axes=1, residual=True)
        >>> u, coarse = jnp.array([[0.0, 2.0, 3.0, 7.0]]), jnp.array([[1.0, 5.0]])
        >>> z, inputs = scales.standard(u, coarse)
        >>> inputs.tolist(), z.tolist()
        ([[2.0, 2.0, 4.0, 4.0]], [[-2.0, 0.0, -1.0, 3.0]])
        >>> bool(jnp.allclose(scales.physical(z, coarse), u))
        True
    """

    num_channels: int = eqx.field(static=True)
    num_condition_channels: int = eqx.field(static=True)
    num_axes: int = eqx.field(static=True)
    residual: bool = eqx.field(static=True)
    periodic: bool = eqx.field(static=True)
    target_scale: Standardisation
    condition_scale: Standardisation

    def __init__(
        self,
        num_channels: int,
        num_condition_channels: int = 0,
        *,
        num_axes: int = 2,
        residual: bool = False,
        periodic: bool = True,
    ) -> None:
        """Scales of 1, until `fitted` learns them.

        Args:
            num_channels: C, of the target.
            num_condition_channels: Of the condition; 0 for none.
            num_axes: Axes of space.
            residual: Subtract the condition's first C channels from the target.
            periodic: Whether the domain is.

        Raises:
            ValueError: A count out of range, a residual without as many channels of a
                condition.
        """
        self.num_channels = check_count("num_channels", num_channels)
        self.num_condition_channels = check_count(
            "num_condition_channels", num_condition_channels, minimum=0
        )
        self.num_axes = check_count("num_axes", num_axes)
        self.residual = check_flag("residual", residual)
        self.periodic = check_flag("periodic", periodic)
        if residual and num_condition_channels < num_channels:
            raise ValueError(
                f"Expected a condition of at least {num_channels} channels for "
                f"residual=True, got {num_condition_channels}. They are subtracted from "
                "the target: pass residual=False, or a condition that begins with them."
            )
        ones = (1,) * num_axes
        self.target_scale = _unit((num_channels, *ones))
        self.condition_scale = _unit((num_condition_channels, *ones))

    def fitted(self, data: Any) -> "FieldScales":
        """The same with means and standard deviations of data, over samples and space.

        Args:
            data: As a configuration takes them, concrete.

        Returns:
            Scales of the same shapes.
        """
        target, condition = as_fields(data)
        self._check_target(target.shape[1:])
        arrays = (target, *jax.tree.leaves(condition))
        if not all(np.isfinite(np.asarray(x)).all() for x in arrays):
            raise ValueError(
                "Expected finite fields to learn scales from, got NaN or infinity. Pass "
                "tx.generation.Fields(target, condition), which says where."
            )
        if condition is None and self.num_condition_channels:
            raise ValueError(
                f"Expected a condition of {self.num_condition_channels} channels to learn "
                "scales from, got none. Pass tx.generation.Fields(target, condition)."
            )
        space = tuple(range(1, self.num_axes + 1))
        raw = jax.jit(jax.vmap(self._raw, in_axes=(0, None)), static_argnums=1)
        inputs = raw(condition, target.shape[2:]) if condition is not None else None
        scale = self.condition_scale
        if self.num_condition_channels:
            scale = fit_standardisation(inputs, shared_axes=space)
        base = inputs[:, : self.num_channels] if self.residual else 0.0
        found = fit_standardisation(target - base, shared_axes=space)
        return eqx.tree_at(
            lambda s: (s.target_scale, s.condition_scale), self, (found, scale)
        )

    def standard(
        self, target: Float[Array, "C *space"], condition: PyTree[Array] | None
    ) -> tuple[Float[Array, "C *space"], Float[Array, "K *space"]]:
        """What a network is trained on: z, and the condition on its grid."""
        self._check_target(target.shape)
        raw = self._raw(condition, target.shape[1:]).astype(target.dtype)
        return self.target_scale(target - self._base(raw)), self.condition_scale(raw)

    def inputs(
        self, condition: PyTree[Array] | None, space: tuple[int, ...]
    ) -> Float[Array, "K *space"]:
        """The condition as a network sees it."""
        return self.condition_scale(self._raw(condition, space))

    def physical(
        self, z: Float[Array, "C *space"], condition: PyTree[Array] | None
    ) -> Float[Array, "C *space"]:
        """The field in its own units."""
        raw = self._raw(condition, z.shape[1:]).astype(z.dtype)
        return self._base(raw) + self.target_scale.inverse(z)

    def space_of(
        self, condition: PyTree[Array] | None, space: Sequence[int] | None
    ) -> tuple[int, ...]:
        """The grid that is asked for; without one the finest of the condition's.

        Args:
            condition: Of one sample.
            space: Points along each axis, or None.

        Raises:
            ValueError: Neither, or a grid of another number of axes.
        """
        for leaf in jax.tree.leaves(condition):
            if jnp.ndim(leaf) != self.num_axes + 1:
                raise ValueError(
                    f"Expected the condition of one sample, (channels, *space) with "
                    f"{self.num_axes} axes of space, got the shape {jnp.shape(leaf)}. Pass "
                    "one sample, and jax.vmap for a batch."
                )
        if space is None:
            grids = [jnp.shape(x)[1:] for x in jax.tree.leaves(condition)]
            if not grids:
                raise ValueError(
                    "Expected the points along each axis for a model without condition, "
                    "got None. Pass `space`, such as space=(32, 32)."
                )
            space = max(grids, key=np.prod)
        lengths = as_lengths(space)
        if lengths is None:
            raise ValueError(
                f"Expected `space` to be a tuple of points along each axis, got {space!r}. "
                f"Pass space=({', '.join([repr(space)] * self.num_axes)},)."
            )
        space = tuple(check_count("space", n) for n in lengths)
        if len(space) != self.num_axes:
            raise ValueError(
                f"Expected `space` of {self.num_axes} axes, as the model has, got "
                f"{space}. Pass one number of points for each."
            )
        return space

    def _raw(self, condition: PyTree[Array] | None, space: tuple[int, ...]) -> Array:
        leaves = jax.tree_util.tree_leaves_with_path(condition)
        for path, leaf in leaves:
            name = f"condition{jax.tree_util.keystr(path)}"
            check_grid(name, jnp.shape(leaf), space)
        count = sum(jnp.shape(leaf)[0] for _, leaf in leaves)
        if count != self.num_condition_channels:
            got = [jnp.shape(leaf) for _, leaf in leaves] or "none"
            raise ValueError(
                f"Expected a condition of {self.num_condition_channels} channels, got "
                f"{count} ({got}). Pass what the model was built for, of one sample."
            )
        grids = [
            upsample(jnp.asarray(x), space, periodic=self.periodic) for _, x in leaves
        ]
        dtype = jnp.result_type(float) if not grids else jnp.result_type(*grids)
        return jnp.concatenate([jnp.zeros((0, *space), dtype), *grids])

    def _base(self, raw: Array) -> Array:
        if self.residual:
            return raw[: self.num_channels]
        return jnp.zeros((1,) * raw.ndim, raw.dtype)

    def _check_target(self, shape: tuple[int, ...]) -> None:
        if len(shape) != self.num_axes + 1 or shape[0] != self.num_channels:
            raise ValueError(
                f"Expected a field of {self.num_channels} channels and {self.num_axes} "
                f"axes of space, got the shape {shape}. Pass what the model was built "
                "for, of one sample (a batch goes to a configuration)."
            )


def _unit(shape: tuple[int, ...]) -> Standardisation:
    dtype = jnp.result_type(float)
    return Standardisation(jnp.zeros(shape, dtype), jnp.ones(shape, dtype))
