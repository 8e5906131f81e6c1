"""How the members of an ensemble share a machine."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from trainax_pk._tree import stays_finite
from trainax_pk.engine._choice import faster_for_members
from trainax_pk.engine._inspect import Work

# Below this many multiply-adds an update is dispatch, not arithmetic.
TINY = 200_000


def split_members(tree: PyTree, mapped: PyTree, size: int) -> list[PyTree]:
    """The members of a stacked tree.

    Args:
        tree: Leaves `(size, ...)` where mapped.
        mapped: The same structure: 0 where a leaf has a member axis, None where all
            members share it.
        size: Number of members.

    Returns:
        A tree for each member.
    """
    return _split(tree, mapped, lambda own: _rows(own, size))


def split_groups(tree: PyTree, mapped: PyTree, num_groups: int) -> list[PyTree]:
    """Members in groups of one size, each stacked: as `split_members`."""
    return _split(tree, mapped, lambda own: _groups(own, num_groups))


def _split(tree: PyTree, mapped: PyTree, split: Callable[[Any], Any]) -> list[PyTree]:
    leaves, treedef = jax.tree.flatten(tree)
    axes = treedef.flatten_up_to(mapped)
    parts = split([x for x, a in zip(leaves, axes, strict=True) if a == 0])

    def part(own: list[Array]) -> PyTree:
        row = iter(own)
        pairs = zip(leaves, axes, strict=True)
        return treedef.unflatten([next(row) if a == 0 else x for x, a in pairs])

    return [part(own) for own in parts]


def place_members(
    tree: PyTree, mapped: PyTree, split: jax.sharding.NamedSharding
) -> PyTree:
    """A stacked tree whose members are split over devices; what they share stays."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, treedef.flatten_up_to(mapped), strict=True)
    return treedef.unflatten(
        [jax.device_put(x, split) if a == 0 else x for x, a in pairs]
    )


@jax.jit
def stack_members(trees: Sequence[PyTree]) -> PyTree:
    """The inverse of `split_members`, in one dispatch."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@jax.jit
def join_groups(trees: Sequence[PyTree]) -> PyTree:
    """The inverse of `split_groups`, in one dispatch."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


def num_groups(num_members: int) -> int:
    """How many vmapped programs keep the cores of a CPU busy, with members alike.

    Example:
        >>> from trainax_pk.engine._members import num_groups
        >>> num_groups(1)
        1
    """
    cores = os.cpu_count() or 1
    fitting = range(1, min(cores, num_members // 2) + 1)
    return max((n for n in fitting if num_members % n == 0), default=1)


# One dispatch for all, where a slice for each leaf and member would be hundreds.
@functools.partial(jax.jit, static_argnames="size")
def _rows(leaves: list[Array], size: int) -> list[list[Array]]:
    return [[x[i] for x in leaves] for i in range(size)]


@functools.partial(jax.jit, static_argnames="count")
def _groups(leaves: list[Array], count: int) -> list[list[Array]]:
    parts = [jnp.split(x, count) for x in leaves]
    return [list(own) for own in zip(*parts, strict=True)]


def run_side_by_side(
    program: Callable[..., Any], members: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Runs an executable for every member, as many at a time as there are cores.

    A loop over small operations keeps one core busy, however many there are.

    Args:
        program: A compiled executable. A function that JAX has yet to trace would see
            the settings of the thread (x64, default device) instead of the caller's.
        members: Arguments of each call.

    Returns:
        What each call returned, computed.
    """
    with ThreadPoolExecutor(min(len(members), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda m: jax.block_until_ready(program(*m)), members))


def decide_members(
    work: Work,
    together: Callable[[int], Any],
    apart: Callable[[int], Any],
    *,
    num_updates: int,
    longest: int,
    raises: bool,
) -> tuple[bool, str]:
    """Whether an ensemble runs vmapped, by rule where that is certain.

    Args:
        work: Of one member's update.
        together: `count -> arrays`: that many updates of all members, vmapped.
        apart: The same, a program for each member.
        num_updates: Number of updates that lie ahead.
        longest: The most updates that a call may ask for.
        raises: Whether training ends when a member is not finite.

    Returns:
        Whether vmapped, and why.
    """
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and work.convolutions and not raises:
        # XLA multiplies grouped convolutions by masks: 0·NaN reaches the other members.
        return False, "one member's NaN must not reach the others"
    if not on_cpu and work.multiply_adds <= TINY:
        return True, "an update of one member is dispatch, not arithmetic"
    return faster_for_members(together, apart, num_updates, longest)


@jax.jit
def finite_members(new: PyTree[Array], old: PyTree[Array]) -> Bool[Array, " members"]:
    """Of which members all parameters that were finite still are."""
    return jax.vmap(stays_finite)(new, old)


def only_norms_overflow(records: PyTree[Array], count: int) -> bool:
    """Whether gradients' norms are infinite in a chunk in which all losses are finite.

    Args:
        records: Leaves `(members, size)`.
        count: How many of the records are filled.
    """
    loss, norm = (np.asarray(records[k])[:, :count] for k in ("loss", "grad_norm"))
    return bool(np.isfinite(loss).all() and np.isinf(norm).any())


def check_members(
    records: PyTree[Array], kept: Bool[Array, " members"], start: int, count: int
) -> None:
    """What a trainer cannot see through vmap: members that are not finite.

    Args:
        records: Leaves `(members, size)`.
        kept: Whose parameters are finite after the chunk.
        start: Number of the chunk's first update.
        count: How many of the records are filled.

    Raises:
        FloatingPointError: Naming the first update that failed, and its member.
    """
    finite = [np.isfinite(x[:, :count]) for x in jax.device_get(records).values()]
    failed = np.argwhere(~np.logical_and.reduce(finite))
    if failed.size:
        member, update = failed[np.argmin(failed[:, 1])]
        raise FloatingPointError(
            "Expected finite losses and gradients, got one that is not, of member "
            f"{member} at update {start + update}. Lower the learning rate, pass "
            "max_grad_norm, or nonfinite='skip'; train the member alone to learn more."
        )
    bad = np.flatnonzero(~np.asarray(kept))
    if bad.size:
        raise FloatingPointError(
            "Expected finite parameters, got some that the optimizer made of finite "
            f"gradients and that are not, of the members {bad.tolist()} in the updates "
            f"{start} to {start + count - 1}. Train one of them alone to learn more, or "
            "pass nonfinite='skip'."
        )
