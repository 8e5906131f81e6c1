"""Trajectories: the raw data of training, validated once."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from trainax_pk._tree import check_flag
from trainax_pk._types import Window

# Entries that the host checks for NaN at a time: 16 MiB of flags.
_CHUNK = 2**24


class Trajectories(eqx.Module):
    """Sampled trajectories with what conditions them. Arrays are kept as given.

    Leaves may be JAX or NumPy arrays, memory maps included. Shapes, dtypes and (with
    one reduction per leaf) values are checked when built; leaves that are traced are
    not searched for NaN.

    Attributes:
        state: Floating leaves `(num_samples, num_times, ...)`.
        sample: Parameters of a trajectory, leaves `(num_samples, ...)`, or None.
        time: Forcing at each time, leaves `(num_samples, num_times, ...)`, or None.

    Raises:
        ValueError: Leaves that disagree in their leading axes, lack them, or are empty;
            a state that is not floating, inputs that are not real; a NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Trajectories
        >>> data = Trajectories(jnp.ones((4, 11, 1, 30)), sample=jnp.arange(4))
        >>> data.num_samples, data.num_times
        (4, 11)
    """

    state: PyTree[Any]
    sample: PyTree[Any] | None
    time: PyTree[Any] | None

    def __init__(
        self,
        state: PyTree[Any],
        sample: PyTree[Any] | None = None,
        time: PyTree[Any] | None = None,
        *,
        check_finite: bool = True,
    ) -> None:
        """Checks and keeps the arrays.

        Args:
            state: Floating leaves `(num_samples, num_times, ...)`.
            sample: Leaves `(num_samples, ...)`, real, or None.
            time: Leaves `(num_samples, num_times, ...)`, real, or None.
            check_finite: Search for NaN and infinity; reads all data once.
        """
        check_flag("check_finite", check_finite)
        named = {"state": state, "sample": sample, "time": time}
        leaves = [
            (jax.tree_util.keystr((jax.tree_util.GetAttrKey(name), *path))[1:], leaf)
            for name, tree in named.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ]
        if not jax.tree.leaves(state):
            raise ValueError(
                "Expected a `state` with array leaves (num_samples, num_times, ...), "
                f"got {state!r} without any. Pass an array or a PyTree of arrays."
            )
        for name, leaf in leaves:
            _check_leaf(name, leaf)
        _check_agreement(leaves)
        if check_finite:
            _check_finite(leaves)
        self.state, self.sample, self.time = state, sample, time

    @property
    def num_samples(self) -> int:
        """Number of trajectories."""
        return jax.tree.leaves(self.state)[0].shape[0]

    @property
    def num_times(self) -> int:
        """Number of times of each trajectory, the initial condition included."""
        return jax.tree.leaves(self.state)[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves once on a device (64-bit data shrinks with x64 off)."""
        return sum(
            math.prod(x.shape) * jax.dtypes.canonicalize_dtype(x.dtype).itemsize
            for x in jax.tree.leaves(self)
        )


def as_trajectories(
    x: Trajectories | PyTree[Any], *, check_finite: bool = True
) -> Trajectories:
    """`Trajectories` as they are; an array or PyTree of arrays as their state.

    Args:
        x: Trajectories, or leaves `(num_samples, num_times, ...)`.
        check_finite: Search for NaN and infinity in what is not yet `Trajectories`.

    Returns:
        The same data.

    Raises:
        ValueError: As `Trajectories`; a PyTree that holds `Trajectories` or a `Window`.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import as_trajectories
        >>> as_trajectories({"u": jnp.ones((2, 5, 3))}).num_times
        5
    """
    if isinstance(x, Trajectories):
        return x
    held = jax.tree.leaves(
        x, is_leaf=lambda node: isinstance(node, Trajectories | Window)
    )
    if any(isinstance(node, Trajectories | Window) for node in held):
        raise ValueError(
            f"Expected trajectories, got {type(x).__name__}, which holds windows or "
            "trajectories. Pass one Trajectories, such as the `arrays` of a Windows: "
            "windows are laid over them where they are needed."
        )
    return Trajectories(x, check_finite=check_finite)


def _check_leaf(name: str, leaf: Any) -> None:
    is_sample = name.startswith("sample")
    axes = "(num_samples, ...)" if is_sample else "(num_samples, num_times, ...)"
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        raise ValueError(
            f"Expected {name} to be an array with leading axes {axes}, got "
            f"{type(leaf).__name__}. Pass a JAX or NumPy array."
        )
    if leaf.ndim < (1 if is_sample else 2):
        raise ValueError(
            f"Expected {name} to have leading axes {axes}, got shape {leaf.shape}. "
            "Add the missing axes, of length 1 if there is one sample or one time."
        )
    if 0 in leaf.shape:
        raise ValueError(
            f"Expected {name} to hold data, got the empty shape {leaf.shape}. "
            "Pass at least one entry along every axis."
        )
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if name.startswith("state") and not floating:
        raise ValueError(
            f"Expected {name} to be floating, got {leaf.dtype}. Cast it with "
            "`.astype(float)`, or put real and imaginary parts in channels."
        )
    real = floating or jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool
    if not real:
        raise ValueError(
            f"Expected {name} to be real (floating, integer or bool), got "
            f"{leaf.dtype}. Put real and imaginary parts in channels."
        )


def _check_agreement(leaves: list[tuple[str, Any]]) -> None:
    first_name, first = leaves[0]
    for name, leaf in leaves[1:]:
        count = 1 if name.startswith("sample") else 2
        expected, got = first.shape[:count], leaf.shape[:count]
        if got != expected:
            raise ValueError(
                f"Expected {name} to start with the axes {expected} of {first_name}, "
                f"got {got}. Pass the same samples and times in every leaf."
            )


def _check_finite(leaves: list[tuple[str, Any]]) -> None:
    flags = []
    for name, leaf in leaves:
        traced = isinstance(leaf, jax.core.Tracer)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not traced:
            flags.append((name, leaf, _is_finite(leaf)))
    # All reductions are under way before the first is waited for.
    for name, leaf, finite in flags:
        if bool(finite):
            continue
        host = np.asarray(leaf)
        bad = ~np.isfinite(host)
        index = tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))
        raise ValueError(
            f"Expected finite data, got {host[index]} at index {index} of {name} "
            f"({np.count_nonzero(bad)} such entries). Remove the samples that blew up, "
            "or pass check_finite=False."
        )


def _is_finite(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        # Data that are there can be looked at while something around is traced.
        with jax.ensure_compile_time_eval():
            return _is_finite_on_device(leaf)
    rows = max(1, _CHUNK * leaf.shape[0] // leaf.size)
    return all(
        np.isfinite(leaf[i : i + rows]).all() for i in range(0, leaf.shape[0], rows)
    )


@jax.jit
def _is_finite_on_device(leaf: Array) -> Array:
    return jnp.all(jnp.isfinite(leaf))
