"""Many devices: every one computes its share of a batch, or of an ensemble."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr
from jaxtyping import PyTree

from trainax_pk.checkpoint._arrays import put
from trainax_pk.checkpoint._team import Team, whole
from trainax_pk.data import Samples, Windows
from trainax_pk.engine import Share

# The axis of a mesh over which members of an ensemble are split; all others split batches.
MEMBERS = "members"
# Smaller arrays are not worth a message for each update.
_SMALLEST = 1024
_SPLIT = (".params", ".opt_state", ".ema", ".more_ema")

Rule = Callable[[str, Any], PartitionSpec]


class Devices:
    """Where training runs: a mesh, or one device.

    Batches are split over all axes of the mesh but "members", over which the members of
    an ensemble are. Data are replicated, parameters, optimizer state and averages too
    unless a rule splits them; the compiler inserts the sum of the gradients. Results are
    those of one device up to the order of that sum.

    Attributes:
        team: The processes whose devices these are.
    """

    def __init__(
        self,
        mesh: Mesh | None,
        batch_size: int,
        parameters: str | Rule = "replicated",
    ) -> None:
        """Checks that batches can be split.

        Args:
            mesh: The devices, or None for one.
            batch_size: Size of a batch.
            parameters: "replicated", "sharded", or a rule `(path, array) ->
                PartitionSpec` for the arrays of the state.

        Raises:
            ValueError: No mesh, or one that does not fit the batches, the processes or
                the parameters.
        """
        _check(mesh, parameters)
        self._mesh: Mesh | None = None
        self._rule = parameters if callable(parameters) else self._largest_axis
        self._split_params = parameters != "replicated"
        self.team = Team(together=mesh is not None and _spans(mesh))
        if mesh is None:
            return
        # Of automatic axes, whatever those of the user's mesh are: the model is not
        # written for any sharding.
        self._mesh = mesh = Mesh(mesh.devices, mesh.axis_names)
        self._axes = tuple(a for a in mesh.axis_names if a != MEMBERS)
        if batch_size % self._parts:
            raise ValueError(
                f"Expected a batch size that the {self._parts} devices of `mesh` divide, "
                f"got {batch_size}. Change one of the two."
            )
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(self._axes))

    @property
    def count(self) -> int:
        """Number of devices."""
        return 1 if self._mesh is None else self._mesh.size

    @property
    def members(self) -> NamedSharding | None:
        """How the members of an ensemble are split, if they are."""
        if self._mesh is None or MEMBERS not in self._mesh.axis_names:
            return None
        return NamedSharding(self._mesh, PartitionSpec(MEMBERS))

    @property
    def share(self) -> Share | None:
        """The part of batches made on the host that is for this process."""
        if self._mesh is None or self.members is not None:
            return None
        return Share(NamedSharding(self._mesh, PartitionSpec(None, self._axes)))

    @property
    def saves_alone(self) -> bool:
        """Whether one process has all that a checkpoint holds."""
        return self.team.size == 1 or not self._split_params

    def check_models(self, *, ensemble: bool, number: int | None) -> None:
        """Models that these devices are for.

        Args:
            ensemble: Whether there are several models.
            number: How many, where that is known.

        Raises:
            ValueError: An ensemble, or none, where the mesh is for the other; members
                that it does not divide.
        """
        if self.count == 1:
            return
        if ensemble and self.members is None:
            raise ValueError(
                f"Expected one model with `mesh` of the axes {self._mesh.axis_names}, got "
                f"an ensemble. Call the axis that its members are split over {MEMBERS!r}."
            )
        if self.members is None:
            return
        if not ensemble:
            raise ValueError(
                f"Expected an ensemble with an axis {MEMBERS!r} of `mesh`, got one model. "
                "Give that axis another name."
            )
        parts = self._mesh.shape[MEMBERS]
        if number is not None and number % parts:
            raise ValueError(
                f"Expected a number of members that {parts} devices divide, got {number}. "
                "Change one of the two."
            )

    def replicate(self, tree: PyTree[Any]) -> PyTree[Any]:
        """Arrays on every device."""
        if self._mesh is None:
            return tree
        return jax.tree.map(lambda x: put(x, self._whole), tree)

    def replicate_items(self, items: Any) -> Any:
        """Windows or samples whose arrays are on every device, if on any."""
        own = isinstance(items, Windows | Samples) and items.residency == "device"
        if self._mesh is None or not own:
            return items
        return eqx.tree_at(lambda w: w.arrays, items, self.replicate(items.arrays))

    def place_order(self, order: Any, items: Any) -> Any:
        """The order of the batches, where the program that reads it is."""
        in_program = items.residency == "device" and self.team.size > 1
        return self.replicate(order) if in_program else order

    def place_state(self, state: PyTree[Any]) -> PyTree[Any]:
        """A training state on the devices, by the rule."""
        if self._mesh is None or self.members is not None:
            return state
        return jax.tree.map(put, state, self._shardings(state))

    def whole(self, tree: PyTree[Any]) -> PyTree[Any]:
        """Arrays that this process can read; called by all processes, if by one."""
        return tree if self.team.size == 1 else whole(tree)

    def split_batches(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A train step that splits its batch over the devices."""
        if self._mesh is None or not self._axes:
            return step

        def split_step(state: PyTree[Any], batch: PyTree[Any]) -> Any:
            batch = jax.lax.with_sharding_constraint(batch, self._split)
            new, info = step(state, batch)
            if self._split_params:
                new = jax.tree.map(_constrained, new, self._shardings(new))
            return new, info

        return split_step

    @property
    def settle(self) -> Callable[[Any], Any] | None:
        """Where a program leaves state and records; None to leave it to the compiler."""
        if self._mesh is None or not (self._split_params or self.team.size > 1):
            return None

        def settle(out: tuple[PyTree[Any], PyTree[Any]]) -> Any:
            state, records = out
            state = jax.tree.map(_constrained, state, self._shardings(state))
            return state, jax.tree.map(lambda x: _constrained(x, self._whole), records)

        return settle

    @property
    def _parts(self) -> int:
        return math.prod(self._mesh.shape[a] for a in self._axes)

    def _shardings(self, state: PyTree[Any]) -> PyTree[NamedSharding]:
        def one(path: Any, x: Any) -> NamedSharding:
            name = keystr(path)
            if self._split_params and name.startswith(_SPLIT) and x.ndim:
                return _sharding(self._mesh, self._rule(name, x), name, x)
            return self._whole

        return jax.tree_util.tree_map_with_path(one, state)

    def _largest_axis(self, path: str, x: Any) -> PartitionSpec:
        """The longest axis that the devices divide, of arrays that are not small."""
        del path
        fitting = [i for i, n in enumerate(x.shape) if n % self._parts == 0]
        if x.size < _SMALLEST or not fitting:
            return PartitionSpec()
        axis = max(fitting, key=lambda i: x.shape[i])
        return PartitionSpec(*[None] * axis, self._axes)


def _sharding(mesh: Mesh, spec: Any, path: str, x: Any) -> NamedSharding:
    """What a rule says of an array, or a ValueError that says what to return."""
    reason = "which is no PartitionSpec"
    if isinstance(spec, PartitionSpec):
        try:
            sharding = NamedSharding(mesh, spec)
            sharding.shard_shape(x.shape)
            return sharding
        except (ValueError, TypeError) as error:
            reason = f"which does not fit ({str(error).splitlines()[0]})"
    raise ValueError(
        f"Expected the rule `parameters` to return a PartitionSpec for {path}, "
        f"{x.dtype}{list(x.shape)}, on a mesh of {dict(mesh.shape)}, got {spec!r}, "
        f"{reason}. Return PartitionSpec() for an array that every device is to have whole."
    )


def _constrained(x: Any, sharding: NamedSharding) -> Any:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    return jax.lax.with_sharding_constraint(x, sharding)


def _spans(mesh: Mesh) -> bool:
    """Whether some of the devices belong to other processes."""
    return any(d.process_index != jax.process_index() for d in mesh.devices.flat)


def _check(mesh: Any, parameters: Any) -> None:
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(
            f"Expected `mesh` to be a jax.sharding.Mesh, got {mesh!r}. Pass for example "
            "jax.make_mesh((jax.device_count(),), ('data',))."
        )
    if not callable(parameters) and parameters not in ("replicated", "sharded"):
        raise ValueError(
            f"Expected `parameters` to be 'replicated', 'sharded' or a function, got "
            f"{parameters!r}. Pass (path, array) -> jax.sharding.PartitionSpec."
        )
    if mesh is None:
        if parameters != "replicated":
            raise ValueError(
                "Expected `mesh` with `parameters`, got None. Pass the devices over "
                "which they are split."
            )
        return
    if not _spans(mesh):
        return
    used = {d.process_index for d in mesh.devices.flat}
    if len(used) != jax.process_count():
        raise ValueError(
            f"Expected a mesh of devices of all {jax.process_count()} processes, got "
            f"{len(used)} of them. Build it from jax.devices()."
        )
    if MEMBERS in mesh.axis_names:
        raise ValueError(
            f"Expected devices of one process for the axis {MEMBERS!r}, got those of "
            f"{len(used)}. Train a part of the members in each process, on a mesh of "
            "jax.local_devices()."
        )
