"""Batches of incomplete observations, with or without the truth."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from trainax_pk._tree import is_concrete


class Batch1D(eqx.Module):
    """Windows of T times of N variables, observed where the mask holds.

    Attributes:
        input: Observations, `(B, T, N)`. What stands where the mask does not hold is
            never read: NaN is welcome there.
        mask: `(B, T, N)`, whether an entry was observed; kept as bool.
        target: The true states, `(B, T, ...)`, or None where they are not known.
        initial: What a solver starts from, `(B, T, ...)`, or None for the observations
            with zeros in the gaps. Needed where states and observations differ in
            shape.

    Raises:
        ValueError: Leaves of another rank, a mask of another shape than the input, a
            mask of other values than 0 and 1, a NaN or infinity that the mask calls
            observed (values that are traced are not searched), leaves of different
            batch sizes, data that are not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> y = jnp.array([[[1.0], [jnp.nan], [3.0]]])  # (B=1, T=3, N=1)
        >>> batch = tx.Batch1D(y, ~jnp.isnan(y))
        >>> batch.observed()[0, :, 0].tolist()
        [1.0, 0.0, 3.0]
    """

    input: Float[Array, "B T N"]
    mask: Bool[Array, "B T N"]
    target: Float[Array, "B T ..."] | None
    initial: Float[Array, "B T ..."] | None

    def __init__(
        self, input: Any, mask: Any, target: Any = None, initial: Any = None
    ) -> None:
        self.input, self.mask, self.target, self.initial = _checked(
            "(B, T, N)", input, mask, target, initial
        )

    @property
    def batch_size(self) -> int:
        """Number B of windows."""
        return self.input.shape[0]

    def observed(self) -> Float[Array, "B T N"]:
        """Observations with zeros in the gaps."""
        return _observed(self)

    def start(self) -> Float[Array, "B T ..."]:
        """What a solver starts from."""
        return _observed(self) if self.initial is None else jnp.asarray(self.initial)


class Batch2D(eqx.Module):
    """Windows of T times of fields of H × W points, observed where the mask holds.

    Attributes:
        input: Observations, `(B, T, H, W)`. What stands where the mask does not hold is
            never read: NaN is welcome there.
        mask: `(B, T, H, W)`, whether an entry was observed; kept as bool.
        target: The true states, `(B, T, ...)`, or None where they are not known.
        initial: What a solver starts from, `(B, T, ...)`, or None for the observations
            with zeros in the gaps.

    Raises:
        ValueError: As `Batch1D`.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> track = jnp.zeros((1, 2, 4, 4)).at[:, :, 1].set(1)
        >>> tx.Batch2D(3 * track, track).observed().sum().item()
        24.0
    """

    input: Float[Array, "B T H W"]
    mask: Bool[Array, "B T H W"]
    target: Float[Array, "B T ..."] | None
    initial: Float[Array, "B T ..."] | None

    def __init__(
        self, input: Any, mask: Any, target: Any = None, initial: Any = None
    ) -> None:
        self.input, self.mask, self.target, self.initial = _checked(
            "(B, T, H, W)", input, mask, target, initial
        )

    @property
    def batch_size(self) -> int:
        """Number B of windows."""
        return self.input.shape[0]

    def observed(self) -> Float[Array, "B T H W"]:
        """Observations with zeros in the gaps."""
        return _observed(self)

    def start(self) -> Float[Array, "B T ..."]:
        """What a solver starts from."""
        return _observed(self) if self.initial is None else jnp.asarray(self.initial)


Batch = Batch1D | Batch2D


def _observed(batch: Any) -> Array:
    # A selection and not a product: 0 · NaN is NaN.
    return jnp.where(batch.mask, batch.input, jnp.zeros((), batch.input.dtype))


def _checked(axes: str, input: Any, mask: Any, target: Any, initial: Any) -> Any:
    for name, x in (("input", input), ("target", target), ("initial", initial)):
        optional = name != "input"
        if x is None and optional:
            continue
        dtype = getattr(x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"Expected `{name}` to be a floating array {axes}, got "
                f"{type(x).__name__ if dtype is None else dtype}. Convert it with "
                "jnp.asarray(x, float)."
            )
        least = 2 if optional else axes.count(",") + 1
        if x.ndim < least or (x.ndim != least and not optional):
            raise ValueError(
                f"Expected `{name}` to have the axes {axes}, got the shape "
                f"{list(x.shape)}. Add axes of length 1, or use the batch of the other "
                "rank."
            )
        if optional and x.shape[:1] != input.shape[:1]:
            raise ValueError(
                f"Expected `{name}` to hold {input.shape[0]} windows as the input "
                f"does, got {x.shape[0]}. Pass the same windows in every leaf."
            )
    mask = _checked_mask(input, mask)
    _check_observed(input, mask)
    return input, mask, target, initial


def _checked_mask(input: Any, mask: Any) -> Any:
    if getattr(mask, "shape", None) != input.shape:
        got = list(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
        raise ValueError(
            f"Expected a mask of the input's shape {list(input.shape)}, got {got}. "
            "Broadcast it: jnp.broadcast_to(mask, input.shape)."
        )
    if mask.dtype == bool:
        return mask
    if is_concrete(mask):
        host = np.asarray(mask)
        wrong = ~((host == 0) | (host == 1))
        if wrong.any():
            raise ValueError(
                f"Expected a mask of 0 and 1, got {host[wrong][0]}. Weights of "
                "observations belong in the cost's `observation_weight` or operator."
            )
    return mask != 0


def _check_observed(input: Any, mask: Any) -> None:
    if not (is_concrete(input) and is_concrete(mask)):
        return
    # One reduction on the device, even while a caller is being traced; the host looks
    # closer only where it must.
    with jax.ensure_compile_time_eval():
        if not bool(jnp.any(~jnp.isfinite(input) & mask)):
            return
    bad = ~np.isfinite(np.asarray(input)) & np.asarray(mask)
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
        f"Expected finite observations, got {np.asarray(input)[index]} at index {index} "
        f"where the mask holds ({bad.sum()} such entries). Set the mask to 0 there."
    )


def is_batch(x: Any) -> bool:
    """Whether a value is a `Batch1D` or a `Batch2D`."""
    return isinstance(x, Batch1D | Batch2D)


def check_batch(batch: Any, kind: type, who: str) -> None:
    """A batch of a kind, or a ValueError."""
    if not isinstance(batch, kind):
        raise ValueError(
            f"Expected {who} to get a {kind.__name__}, got {type(batch).__name__}. "
            f"Pass tx.{kind.__name__}(input, mask, target)."
        )
