"""The part of every batch that the devices of one process compute."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, PyTree


class Share:
    """What of batches, leaves `(n, B, ...)` split along B, a process has to read.

    Example:
        >>> import jax
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> from trainax_pk.engine import Share
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> Share(NamedSharding(mesh, PartitionSpec(None, "data"))).columns(4)
        array([0, 1, 2, 3])
    """

    def __init__(self, sharding: NamedSharding) -> None:
        """Keeps the sharding.

        Args:
            sharding: Of leaves `(n, B, ...)`.
        """
        self._sharding = sharding

    def columns(self, batch_size: int) -> Int[np.ndarray, " b"]:
        """Places in a batch that belong to devices of this process, ascending."""
        places = self._sharding.addressable_devices_indices_map((1, batch_size))
        parts = [np.arange(batch_size)[index[1]] for index in places.values()]
        return np.unique(np.concatenate(parts))

    def put(self, batches: PyTree[Any], batch_size: int) -> PyTree[Array]:
        """Batches on the devices.

        Args:
            batches: Leaves `(n, b, ...)`, the columns of this process.
            batch_size: B.

        Returns:
            Leaves `(n, B, ...)`, of which every device holds its part.
        """
        columns = self.columns(batch_size)

        def one(x: np.ndarray) -> Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                wanted = np.arange(batch_size)[index[1]]
                first = int(np.searchsorted(columns, wanted[0]))
                return x[:, first : first + len(wanted)]

            shape = (len(x), batch_size, *x.shape[2:])
            return jax.make_array_from_callback(shape, self._sharding, part)

        return jax.tree.map(one, batches)
