"""Windows over trajectories by index arithmetic; no window is ever stored."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from trainax_pk._tree import check_count, check_flag
from trainax_pk._types import Window
from trainax_pk.data._trajectories import Trajectories, as_trajectories

Residency = Literal["auto", "device", "host"]
Indices = Int[Array | np.ndarray, " B"]
_MAX_WINDOWS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class WindowLayout:
    """Where window i lies: hashable, without arrays, so it may be static under jit.

    i = s · num_starts + k stands for sample s and the times from k · stride on.

    Attributes:
        num_samples: Number of trajectories.
        num_starts: Number of windows in each of them.
        length: L, number of times of a window.
        stride: Times between the starts of neighbouring windows.
        only_initial: State leaves hold the first time of a window only.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Windows
        >>> layout = Windows(jnp.ones((4, 11, 3)), 2).layout
        >>> layout.num_starts, layout.length
        (9, 3)
    """

    num_samples: int
    num_starts: int
    length: int
    stride: int
    only_initial: bool

    def gather(self, arrays: Trajectories, indices: Indices) -> Window:
        """The windows of some indices: pure, for use within jit, vmap and scan.

        Args:
            arrays: Trajectories of this layout.
            indices: `(B,)`, within [0, num_samples · num_starts). They are not checked
                here; those outside are clamped to the last sample.

        Returns:
            State `(B, L, ...)` or `(B, 1, ...)`, sample `(B, ...)`, time `(B, L, ...)`.
            Memory beyond it is O(B).
        """
        sample, start = self.locate(jnp.asarray(indices, jnp.int32))
        state_length = 1 if self.only_initial else self.length
        return Window(
            jax.tree.map(
                lambda x: _slices(x, sample, start, state_length), arrays.state
            ),
            jax.tree.map(lambda x: x.at[sample].get(mode="clip"), arrays.sample),
            jax.tree.map(lambda x: _slices(x, sample, start, self.length), arrays.time),
        )

    def gather_host(self, arrays: Trajectories, indices: Indices) -> Window:
        """As `gather`, on the host: NumPy in, NumPy out, the same bits.

        Args:
            arrays: Trajectories of NumPy arrays (memory maps are read as needed).
            indices: `(B,)`, concrete.

        Returns:
            A window of NumPy arrays in the dtypes that JAX would give them.
        """
        sample, start = self.locate(np.asarray(indices))
        state_length = 1 if self.only_initial else self.length
        rows, times = sample[:, None], start[:, None] + np.arange(self.length)
        return Window(
            jax.tree.map(
                lambda x: _canonical(x[rows, times[:, :state_length]]), arrays.state
            ),
            jax.tree.map(lambda x: _canonical(x[sample]), arrays.sample),
            jax.tree.map(lambda x: _canonical(x[rows, times]), arrays.time),
        )

    def locate(self, indices: Any) -> tuple[Any, Any]:
        """Sample, and first time, of the windows of some indices."""
        sample = indices // self.num_starts
        return sample, (indices - sample * self.num_starts) * self.stride


class Windows(eqx.Module):
    """All windows of `num_rollout_steps + 1` consecutive times of some trajectories.

    Window i belongs to sample i // n and starts at time (i mod n) · stride, with
    n = (num_times - L) // stride + 1 starts per sample: sample-major, the order of
    trainax's `TrajectorySubStacker`. `len` is num_samples · n.

    Memory is that of the trajectories, plus one batch while gathering. An engine passes
    `windows.arrays` to a jitted function as an **argument** and calls
    `windows.gather(arrays, indices)` in it, which depends on static numbers alone.

    Attributes:
        arrays: The trajectories, on the device or as NumPy arrays.
        layout: The index arithmetic; hashable.
        num_rollout_steps: L - 1.
        residency: "device" or "host", where the arrays are.

    Source: trainax (github.com/Ceyron/trainax), `TrajectorySubStacker`, which stores
    every window.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Windows
        >>> data = jnp.arange(10.0).reshape(2, 5, 1)  # two samples of five times
        >>> windows = Windows(data, 2)
        >>> len(windows)
        6
        >>> windows[4].state[0, :, 0].tolist()
        [6.0, 7.0, 8.0]
    """

    arrays: Trajectories
    layout: WindowLayout = eqx.field(static=True)
    num_rollout_steps: int = eqx.field(static=True)
    residency: str = eqx.field(static=True)

    def __init__(
        self,
        trajectories: Trajectories | PyTree[Any],
        num_rollout_steps: int,
        *,
        stride: int = 1,
        only_initial: bool = False,
        residency: Residency = "auto",
    ) -> None:
        """Lays windows over trajectories.

        Args:
            trajectories: `Trajectories`, or leaves `(num_samples, num_times, ...)`.
            num_rollout_steps: L - 1 >= 0.
            stride: Times between the starts of neighbouring windows, >= 1.
            only_initial: Gather the first state of a window only, for residuum
                training. Forcing keeps its L times, which a rollout still needs.
            residency: "device" moves NumPy data to the default device, "host" turns
                all into NumPy arrays from which batches are gathered one by one. "auto"
                chooses the device unless the data exceed half of the memory it reports.

        Raises:
            ValueError: A window longer than the trajectories, a bad count or flag, an
                unknown residency, data that `Trajectories` refuses.
        """
        num_rollout_steps = check_count(
            "num_rollout_steps", num_rollout_steps, minimum=0
        )
        stride = check_count("stride", stride)
        check_flag("only_initial", only_initial)
        data = as_trajectories(trajectories)
        length = num_rollout_steps + 1
        if length > data.num_times:
            raise ValueError(
                f"Expected windows of at most {data.num_times} times, the length of "
                f"the trajectories, got {length} (num_rollout_steps + 1). Pass "
                f"num_rollout_steps <= {data.num_times - 1}, or longer trajectories."
            )
        num_starts = (data.num_times - length) // stride + 1
        if data.num_samples * num_starts > _MAX_WINDOWS:
            raise ValueError(
                f"Expected at most {_MAX_WINDOWS} windows, got "
                f"{data.num_samples * num_starts}. Pass a larger stride, or fewer data."
            )
        self.layout = WindowLayout(
            data.num_samples, num_starts, length, stride, only_initial
        )
        self.num_rollout_steps = num_rollout_steps
        self.residency = resolve_residency(residency, data.nbytes)
        move = np.asarray if self.residency == "host" else jnp.asarray
        self.arrays = jax.tree.map(move, data)

    def __len__(self) -> int:
        return self.layout.num_samples * self.layout.num_starts

    def __getitem__(self, indices: Any) -> Window:
        """Windows of an index, a slice or an integer array, with a batch axis.

        Negative indices count from the end. Raises IndexError outside of the data and
        TypeError for anything but integers.
        """
        checked = self._check_indices(indices)
        if self.residency == "host":
            return self.gather_host(checked)
        return _gather_jitted(self.layout, self.arrays, jnp.asarray(checked))

    @property
    def gather(self) -> Callable[[Trajectories, Indices], Window]:
        """`(arrays, indices) -> Window`: the pure `WindowLayout.gather`.

        A method of the layout rather than of `self`, hence hashable: `jax.jit` takes it
        as it is, and it cannot capture the arrays. `indices` are not checked.
        """
        return self.layout.gather

    def gather_host(self, indices: Indices) -> Window:
        """A batch of NumPy arrays, bitwise the one that a device would gather.

        Args:
            indices: `(B,)`, within [0, len(self)); concrete.

        Returns:
            A batch of windows.

        Raises:
            ValueError: The data are not on the host.
        """
        if self.residency != "host":
            raise ValueError(
                "Expected windows with residency 'host', got 'device'. Build them with "
                "residency='host', or use `windows.gather(windows.arrays, indices)`."
            )
        return self.layout.gather_host(self.arrays, indices)

    @property
    def item_bytes(self) -> int:
        """Bytes of the states of one window."""
        total = sum(x.nbytes for x in jax.tree.leaves(self.arrays.state))
        times = self.layout.num_samples * self.arrays.num_times
        return self.layout.length * total // times

    def _check_indices(self, indices: Any) -> Int[np.ndarray, " B"]:
        if isinstance(indices, slice):
            return np.arange(*indices.indices(len(self)), dtype=np.int32)
        array = np.atleast_1d(np.asarray(indices))
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise TypeError(
                "Expected an integer, a slice or a 1D array of integers as index, got "
                f"{array.dtype}{list(array.shape)}. Use np.flatnonzero for a mask."
            )
        outside = (array < -len(self)) | (array >= len(self))
        if outside.any():
            raise IndexError(
                f"Expected indices in [{-len(self)}, {len(self)}), got "
                f"{array[outside][0]}. Pass an index below len(windows)."
            )
        array = array.astype(np.int64)
        return np.where(array < 0, array + len(self), array).astype(np.int32)


@eqx.filter_jit
def _gather_jitted(layout: WindowLayout, arrays: Trajectories, indices: Array) -> Any:
    return layout.gather(arrays, indices)


def _slices(
    x: Array, sample: Int[Array, " B"], start: Int[Array, " B"], length: int
) -> Array:
    # One contiguous slice per window: on a CPU as fast as any other form of gather, and
    # it neither reshapes nor moves the sample axis, which may be sharded.
    # A Python 0 would be int64 with x64 on, and indices must share one dtype.
    rest = (jnp.zeros((), sample.dtype),) * (x.ndim - 2)

    def one(s: Array, t: Array) -> Array:
        at = (s, t, *rest)
        return jax.lax.dynamic_slice(x, at, (1, length, *x.shape[2:]))[0]

    return jax.vmap(one)(sample, start)


def _canonical(x: np.ndarray) -> np.ndarray:
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def resolve_residency(residency: str, nbytes: int) -> str:
    """Where so many bytes of data go: "device" or "host"."""
    if residency not in ("auto", "device", "host"):
        raise ValueError(
            "Expected `residency` to be 'auto', 'device' or 'host', got "
            f"{residency!r}. Pass one of these."
        )
    if residency != "auto":
        return residency
    limit = _bytes_limit()
    return "host" if limit is not None and nbytes > limit / 2 else "device"


def _bytes_limit() -> int | None:
    """Memory of the default device; None where it does not tell, as CPUs do not."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")
