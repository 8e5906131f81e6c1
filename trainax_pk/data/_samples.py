"""Samples that are trained on whole, beside windows that are cut out of trajectories."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from trainax_pk.data._windows import Residency, resolve_residency

Indices = Int[Array | np.ndarray, " B"]


@dataclasses.dataclass(frozen=True)
class SampleLayout:
    """Sample i is row i of every leaf: hashable, without arrays.

    Attributes:
        num_samples: Number of samples.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Samples
        >>> Samples({"x": jnp.ones((7, 2))}).layout
        SampleLayout(num_samples=7)
    """

    num_samples: int

    def gather(self, arrays: PyTree[Array], indices: Indices) -> PyTree[Array]:
        """The samples of some indices: pure, for use within jit, vmap and scan.

        Args:
            arrays: Leaves `(num_samples, ...)`.
            indices: `(B,)`; those outside are clamped.

        Returns:
            Leaves `(B, ...)`.
        """
        indices = jnp.asarray(indices, jnp.int32)
        return jax.tree.map(lambda x: x.at[indices].get(mode="clip"), arrays)

    def gather_host(self, arrays: PyTree[Any], indices: Indices) -> PyTree[Any]:
        """As `gather`, on the host: NumPy in, NumPy out, the same bits."""
        rows = np.asarray(indices)
        return jax.tree.map(
            lambda x: x[rows].astype(
                jax.dtypes.canonicalize_dtype(x.dtype), copy=False
            ),
            arrays,
        )


class Samples(eqx.Module):
    """A PyTree of arrays with one leading sample axis, such as a `tx.Batch1D` of all data.

    What `Windows` is for trajectories: `len`, indexing, and gathering inside a compiled
    program. A batch of B samples has the structure of the whole.

    Attributes:
        arrays: Leaves `(num_samples, ...)`, on the device or as NumPy arrays.
        layout: The index arithmetic; hashable.
        residency: "device" or "host", where the arrays are.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> y = jnp.ones((6, 20, 3))
        >>> samples = tx.data.Samples(tx.Batch1D(y, y, target=y))
        >>> len(samples), samples[jnp.array([4, 1])].target.shape
        (6, (2, 20, 3))
    """

    arrays: PyTree[Any]
    layout: SampleLayout = eqx.field(static=True)
    residency: str = eqx.field(static=True)

    def __init__(self, arrays: PyTree[Any], *, residency: Residency = "auto") -> None:
        """Checks and keeps the arrays.

        Args:
            arrays: Leaves `(num_samples, ...)`.
            residency: As for `Windows`.

        Raises:
            ValueError: No array, leaves of different numbers of samples, an unknown
                residency.
        """
        leaves = jax.tree.leaves(arrays)
        counts = {jnp.shape(x)[:1] for x in leaves}
        if len(counts) != 1 or counts <= {(), (0,)}:
            raise ValueError(
                "Expected arrays with one leading sample axis, got the shapes "
                f"{[jnp.shape(x) for x in leaves]}. Give every leaf the same, non-zero "
                "number of samples."
            )
        nbytes = sum(
            math.prod(x.shape) * jax.dtypes.canonicalize_dtype(x.dtype).itemsize
            for x in leaves
        )
        self.residency = resolve_residency(residency, nbytes)
        move = np.asarray if self.residency == "host" else jnp.asarray
        self.arrays = jax.tree.map(move, arrays)
        self.layout = SampleLayout(counts.pop()[0])

    def __len__(self) -> int:
        return self.layout.num_samples

    def __getitem__(self, indices: Any) -> PyTree[Any]:
        """Samples of a slice or an integer array, with a batch axis."""
        rows = np.atleast_1d(np.arange(len(self))[indices])
        if self.residency == "host":
            return self.gather_host(rows)
        return self.layout.gather(self.arrays, rows)

    @property
    def item_bytes(self) -> int:
        """Bytes of one sample."""
        return sum(x.nbytes for x in jax.tree.leaves(self.arrays)) // len(self)

    @property
    def gather(self) -> Any:
        """`(arrays, indices) -> batch`: the pure `SampleLayout.gather`."""
        return self.layout.gather

    def gather_host(self, indices: Indices) -> PyTree[Any]:
        """A batch of NumPy arrays, bitwise the one that a device would gather.

        Args:
            indices: `(B,)`, within [0, len(self)); concrete.

        Returns:
            Leaves `(B, ...)`.
        """
        return self.layout.gather_host(self.arrays, indices)
