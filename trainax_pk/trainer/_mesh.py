"""Data parallelism: every device computes the gradient of its share of a batch."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from trainax_pk.data import Samples, Windows


class Devices:
    """Where training runs: a mesh over whose axes batches are split, or one device.

    Parameters, optimizer state and data are replicated; the compiler inserts the sum of
    the gradients. Results are those of one device up to the order of that sum.
    """

    def __init__(self, mesh: Mesh | None, batch_size: int) -> None:
        """Checks that batches can be split.

        Raises:
            ValueError: No mesh, or a batch size that its devices do not divide.
        """
        if mesh is not None and not isinstance(mesh, Mesh):
            raise ValueError(
                f"Expected `mesh` to be a jax.sharding.Mesh, got {mesh!r}. Pass for "
                "example jax.make_mesh((jax.device_count(),), ('data',))."
            )
        if mesh is not None and batch_size % mesh.size:
            raise ValueError(
                f"Expected a batch size that the {mesh.size} devices of `mesh` divide, "
                f"got {batch_size}. Change one of the two."
            )
        self._whole: NamedSharding | None = None
        if mesh is not None:
            # Of automatic axes, whatever those of the user's mesh are: the model is not
            # written for any sharding.
            mesh = Mesh(mesh.devices, mesh.axis_names)
            self._whole = NamedSharding(mesh, PartitionSpec())
            self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    @property
    def count(self) -> int:
        """Number of devices."""
        return 1 if self._whole is None else self._whole.mesh.size

    def replicate(self, tree: PyTree[Any]) -> PyTree[Any]:
        """Arrays on every device."""
        return tree if self._whole is None else jax.device_put(tree, self._whole)

    def replicate_items(self, items: Any) -> Any:
        """Windows or samples whose arrays are on every device, if on any."""
        own = isinstance(items, Windows | Samples) and items.residency == "device"
        if self._whole is None or not own:
            return items
        return eqx.tree_at(lambda w: w.arrays, items, self.replicate(items.arrays))

    def split_batches(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A train step that splits its batch over the devices."""
        if self._whole is None:
            return step

        def split_step(state: PyTree[Any], batch: PyTree[Any]) -> Any:
            batch = jax.lax.with_sharding_constraint(batch, self._split)
            return step(state, batch)

        return split_step
