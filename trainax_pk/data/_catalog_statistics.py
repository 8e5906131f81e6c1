"""Statistics of data, taken once and stored with the model."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from trainax_pk._tree import check_count


class Normalisation(eqx.Module):
    """x ↦ (x − mean) / std with statistics that are stored with the model.

    Attributes:
        mean: Leaves that broadcast with those of x.
        std: Likewise, positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Normalisation
        >>> scale = Normalisation(jnp.array([1.0]), jnp.array([2.0]))
        >>> float(scale(jnp.array([5.0]))[0]), float(scale.inverse(jnp.array([2.0]))[0])
        (2.0, 5.0)
    """

    mean: PyTree[Array]
    std: PyTree[Array]

    def __call__(self, x: PyTree[Array]) -> PyTree[Array]:
        """Normalises."""
        return jax.tree.map(lambda x, m, s: (x - m) / s, x, self.mean, self.std)

    def inverse(self, x: PyTree[Array]) -> PyTree[Array]:
        """Undoes it."""
        return jax.tree.map(lambda x, m, s: x * s + m, x, self.mean, self.std)


def fit_normalisation(dataset: Any, *, num_channel_axes: int = 0) -> Normalisation:
    """Mean and standard deviation of the inputs of a dataset, in one pass.

    Streamed: memory is that of one item, sums are double precision, and means of parts
    are combined without cancellation (Chan, Golub & LeVeque 1983,
    doi:10.1080/00031305.1983.10483115).

    Args:
        dataset: Anything that iterates over pairs (x, ...).
        num_channel_axes: Leading axes of x that keep statistics of their own.

    Returns:
        Statistics with the channel axes and axes of length 1 behind them, in the dtype
        of x.

    Raises:
        ValueError: No items, values that are not finite, or that never vary.

    Example:
        >>> import numpy as np
        >>> from trainax_pk.data import fit_normalisation
        >>> pairs = [(np.array([0.0, 4.0]), None), (np.array([2.0, 2.0]), None)]
        >>> float(fit_normalisation(pairs).mean[0])
        2.0
    """
    check_count("num_channel_axes", num_channel_axes, minimum=0)
    total: list[tuple[int, np.ndarray, np.ndarray]] = []
    structure, dtypes = None, []
    for x, *_ in dataset:
        leaves, structure = jax.tree.flatten(x)
        dtypes = [np.asarray(leaf).dtype for leaf in leaves]
        parts = [_moments(np.asarray(leaf), num_channel_axes) for leaf in leaves]
        pairs = zip(total, parts, strict=True)
        total = [_combine(a, b) for a, b in pairs] if total else parts
    if structure is None:
        raise ValueError("Expected items to take statistics of, got none.")
    means, stds = [], []
    for (count, mean, squares), dtype in zip(total, dtypes, strict=True):
        std = np.sqrt(squares / count)
        if not np.isfinite(std).all() or not (std > 0).all():
            raise ValueError(
                f"Expected finite data that vary, got a standard deviation of {std}. "
                "Remove constant channels and missing values before."
            )
        # Counts have statistics that are no counts.
        kept = dtype if np.issubdtype(dtype, np.floating) else np.float64
        kept = jax.dtypes.canonicalize_dtype(kept)
        means.append(jnp.asarray(mean, kept))
        stds.append(jnp.asarray(std, kept))
    unflatten = jax.tree.unflatten
    return Normalisation(unflatten(structure, means), unflatten(structure, stds))


def _moments(x: np.ndarray, channels: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean and sum of squared distances from it."""
    x = x.astype(np.float64)
    axes = tuple(range(channels, x.ndim))
    mean = x.mean(axis=axes, keepdims=True)
    count = int(np.prod([x.shape[a] for a in axes], dtype=np.int64))
    return count, mean, ((x - mean) ** 2).sum(axis=axes, keepdims=True)


def _combine(a: Any, b: Any) -> tuple[int, np.ndarray, np.ndarray]:
    count = a[0] + b[0]
    apart = b[1] - a[1]
    mean = a[1] + apart * b[0] / count
    return count, mean, a[2] + b[2] + apart**2 * a[0] * b[0] / count
