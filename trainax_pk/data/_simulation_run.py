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
        # A scan gives time after time. To bring the samples to the front takes a CPU's
        # compiler longer than many a simulation; the copy to the result does it instead.
        on_cpu = all(device.platform == "cpu" for device in self._devices)
        self._times_first = on_cpu and recipe.num_steps is not None
        self._arrays, static = eqx.partition(recipe, eqx.is_array)
        self._placed: dict[Any, PyTree[Array]] = {}
        self.num_traces = 0

        def block(arrays: PyTree[Array], word: Array, indices: Array) -> Draw:
            self.num_traces += 1
            whole = eqx.combine(arrays, static)
            axes = Draw(0, int(self._times_first), 0, 0)
            return jax.vmap(lambda i: whole.draw(word, i), out_axes=axes)(indices)

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
                out = self._collect(out, len(rows), *under_way.popleft())
        while under_way:
            out = self._collect(out, len(rows), *under_way.popleft())
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
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        return jax.tree.map(lambda x: x[:0], self._samples_first(zeros))

    def _collect(self, out: Any, length: int, places: np.ndarray, draw: Draw) -> Any:
        """Copies a block to where its samples belong."""
        host = self._samples_first(jax.tree.map(np.asarray, draw))
        if out is None:
            new = lambda x: np.empty((length, *x.shape[1:]), x.dtype)  # noqa: E731
            out = jax.tree.map(new, host)
        used = places >= 0
        to = places[used]
        # A run of neighbours, the usual case, is one copy.
        is_run = len(to) > 0 and (np.diff(to) == 1).all()
        target = slice(int(to[0]), int(to[-1]) + 1) if is_run else to

        def copy(x: np.ndarray, y: np.ndarray) -> None:
            if not used.all():
                x[target] = y[used]
            elif is_run and not y.flags.c_contiguous:
                _copy_states(x[target], y)
            else:
                x[target] = y

        jax.tree.map(copy, out, host)
        return out

    def _samples_first(self, draw: Draw) -> Draw:
        """Views with the axis of samples in front."""
        if not self._times_first:
            return draw
        return draw._replace(
            output=jax.tree.map(lambda y: y.swapaxes(0, 1), draw.output)
        )


def _copy_states(x: np.ndarray, y: np.ndarray) -> None:
    """`x[:] = y` for `(samples, times, ...)` of which y lies in memory time after time.

    A state is copied as one item of many bytes: NumPy is slow with a last axis of a few
    numbers.
    """
    state = np.dtype((np.void, y[0, 0].nbytes))
    times, samples = y.shape[1], y.shape[0]
    source = y.swapaxes(0, 1).reshape(times, samples, -1).view(state)
    x.reshape(samples, times, -1).view(state)[:] = source.swapaxes(0, 1)


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
    if len(rows) and (np.diff(rows) == 1).all():
        return _pack_run(rows, width)
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


def _pack_run(rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for neighbours, without sorting."""
    num_blocks = -(-len(rows) // width)
    places = np.full(num_blocks * width, -1, np.int64)
    places[: len(rows)] = np.arange(len(rows))
    places = np.roll(places.reshape(num_blocks, width), rows[0] % width, axis=1)
    spare = rows[np.arange(num_blocks) * width]
    return np.where(places >= 0, rows[places], spare[:, None]), places
