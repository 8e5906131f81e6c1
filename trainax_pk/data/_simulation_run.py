"""Runs blocks of samples on all devices, one compiled program of one width."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from trainax_pk.data._simulation_program import Draw, Recipe

# Blocks under way on each device: one computes while another is fetched.
_DEPTH = 2


class Simulated(NamedTuple):
    """Samples with what is known about them, as NumPy arrays.

    Attributes:
        params: What the prior drew, leaves `(n, ...)`.
        output: What came of it, leaves `(n, ...)`.
        failed: `(n,)`, whether a sample is not finite or beyond the limit.
        attempts: `(n,)`, draws that were made for it.
    """

    params: PyTree[np.ndarray]
    output: PyTree[np.ndarray]
    failed: np.ndarray
    attempts: np.ndarray


class Runner:
    """The compiled block of a recipe, on every device.

    Sample i is always computed in lane i mod `width`, beside whatever samples. Lanes do
    not see each other, and one program treats one lane in one way: so a sample has the
    same bits alone, in a slice and in the whole.
    """

    def __init__(self, recipe: Recipe, width: int, devices: Sequence[Any]) -> None:
        self.width = width
        self._devices = tuple(devices)
        self._arrays, static = eqx.partition(recipe, eqx.is_array)
        self._placed: dict[Any, PyTree[Array]] = {}
        self.num_traces = 0

        def block(arrays: PyTree[Array], word: Array, indices: Array) -> Draw:
            self.num_traces += 1
            whole = eqx.combine(arrays, static)
            return jax.vmap(lambda i: whole.draw(word, i))(indices)

        self._block = jax.jit(block)

    def run(self, word: np.uint32, rows: np.ndarray) -> Simulated:
        """The samples of some rows, in their order."""
        blocks, places = pack(rows, self.width)
        under_way: collections.deque = collections.deque()
        out = None
        for i, indices in enumerate(blocks):
            device = self._devices[i % len(self._devices)]
            # The whole block is one argument on one device: no transfer is waited for.
            args = jax.device_put((word, indices.astype(np.uint32)), device)
            under_way.append((places[i], self._block(self._on(device), *args)))
            if len(under_way) > _DEPTH * len(self._devices):
                out = _collect(out, len(rows), *under_way.popleft())
        while under_way:
            out = _collect(out, len(rows), *under_way.popleft())
        if out is None:
            out = self._nothing(word)
        return Simulated(*out)

    def _on(self, device: Any) -> PyTree[Array]:
        if device not in self._placed:
            self._placed[device] = jax.device_put(self._arrays, device)
        return self._placed[device]

    def _nothing(self, word: np.uint32) -> Draw:
        indices = jax.ShapeDtypeStruct((self.width,), jnp.uint32)
        like = jax.eval_shape(self._block, self._arrays, word, indices)
        return jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), like)


def pack(rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows into blocks, row i into lane i mod width.

    Args:
        rows: `(n,)`, any order, repeats allowed.
        width: Lanes of a block.

    Returns:
        Rows of each block, `(num_blocks, width)`, with a row of the block repeated in
        lanes that nobody asked for; and the position in `rows` that a lane serves,
        `(num_blocks, width)`, -1 for none. As few blocks as the fullest lane has rows.
    """
    lanes = rows % width
    order = np.argsort(lanes, kind="stable")
    sorted_lanes = lanes[order]
    first = np.searchsorted(sorted_lanes, sorted_lanes, side="left")
    block = np.arange(len(rows)) - first
    num_blocks = int(block.max()) + 1 if len(rows) else 0
    places = np.full((num_blocks, width), -1, np.int64)
    places[block, sorted_lanes] = order
    used = places >= 0
    # Any row of the block will do: its result is dropped.
    spare = rows[places[np.arange(num_blocks), used.argmax(axis=1)]]
    return np.where(used, rows[places], spare[:, None]), places


def _collect(out: Any, length: int, places: np.ndarray, draw: Draw) -> Any:
    host = jax.tree.map(np.asarray, draw)
    if out is None:
        out = jax.tree.map(lambda x: np.empty((length, *x.shape[1:]), x.dtype), host)
    used = places >= 0
    to = places[used]
    # A run of neighbours, the usual case, is one copy.
    is_run = len(to) > 0 and (np.diff(to) == 1).all()
    target = slice(int(to[0]), int(to[-1]) + 1) if is_run else to

    def copy(x: np.ndarray, y: np.ndarray) -> None:
        x[target] = y if used.all() else y[used]

    jax.tree.map(copy, out, host)
    return out
