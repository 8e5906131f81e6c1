"""The parts of a cache, made from its source."""

from typing import Any

import jax
import numpy as np

from trainax_pk.data._cache_manifest import Layout
from trainax_pk.data._cache_store import Rows
from trainax_pk.data._simulation import SimulationDataset

# Rows as leaves, and the failed draws of each row.
_Made = tuple[list[np.ndarray], np.ndarray]


class PartReader:
    """Rows of one part after another, while the one before is still written.

    A simulation makes whole blocks, whatever it is asked for. Where parts are smaller,
    what is left of a block is kept for the parts after it.
    """

    def __init__(self, source: Any, layout: Layout) -> None:
        self._source, self._layout = source, layout
        self._is_simulation = isinstance(source, SimulationDataset)
        self._start = 0
        self._kept: _Made | None = None

    def read(self, part: int) -> tuple[Rows, int]:
        """Rows of a part by leaf, and how many draws of them failed.

        Raises:
            ValueError: Rows that are not like the others.
        """
        start, stop = self._layout.rows(part)
        if self._is_simulation:
            leaves, failed = self._simulate(start, stop)
            num_failed = int(failed.sum())
        else:
            before = getattr(self._source, "num_failed", 0)
            leaves = [_own(x) for x in jax.tree.leaves(self._source[start:stop])]
            num_failed = getattr(self._source, "num_failed", 0) - before
        got = [(x.shape, x.dtype.name) for x in leaves]
        expected = [((stop - start, *x.shape), x.dtype) for x in self._layout.leaves]
        if got != expected:
            raise ValueError(
                f"Expected rows {start} to {stop - 1} of the source with shapes and "
                f"dtypes {expected}, got {got}. Every row of a dataset must be alike."
            )
        names = [leaf.name for leaf in self._layout.leaves]
        return dict(zip(names, leaves, strict=True)), num_failed

    def _simulate(self, start: int, stop: int) -> _Made:
        pieces = []
        if self._kept is not None and start >= self._start:
            leaves, failed = self._kept
            kept = slice(start - self._start, stop - self._start)
            pieces.append(([x[kept] for x in leaves], failed[kept]))
        begin = start + sum(len(failed) for _, failed in pieces)
        if begin < stop:
            block = self._source.block_size
            end = min(-(-stop // block) * block, len(self._source))
            made = self._source.simulate(slice(begin, end))
            leaves = jax.tree.leaves((made.params, made.output))
            failed = made.attempts - 1 + made.failed
            self._start, self._kept = begin, None
            if end > stop:
                self._kept = leaves, failed
            count = stop - begin
            pieces.append(([x[:count] for x in leaves], failed[:count]))
        if len(pieces) == 1:
            return pieces[0]
        columns = zip(*(leaves for leaves, _ in pieces), strict=True)
        joined = [np.concatenate(column) for column in columns]
        return joined, np.concatenate([failed for _, failed in pieces])


def _own(x: Any) -> np.ndarray:
    """An array that its source cannot write to again, as nobody can to JAX's.

    In the byte order of this machine, which names of dtypes do not tell.
    """
    if isinstance(x, jax.Array) or _is_frozen(x):
        return np.asarray(x)
    x = np.asarray(x)
    return np.array(x, x.dtype.newbyteorder("="), order="K")


def _is_frozen(x: Any) -> bool:
    """Whether an array is a view of what can never be written to.

    Its own flag does not tell: whoever owns the memory may lift it.
    """
    while isinstance(x, np.ndarray) and not x.flags.writeable and x.dtype.isnative:
        owner = x.base.obj if isinstance(x.base, memoryview) else x.base
        if isinstance(owner, bytes | jax.Array):
            return True
        x = owner
    return False
