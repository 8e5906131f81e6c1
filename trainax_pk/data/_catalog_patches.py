"""Patches of arrays: where they lie, and how they reach over the border."""

import abc
import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from trainax_pk._tree import check_count

Starts = tuple[int, ...]
_BORDERS = ("inside", "wrap", "edge")


class AbstractPatches(abc.ABC):
    """Patches over the trailing axes of an array, time among them if it is one.

    To add one: `num_patches` and `start`, pure functions of their arguments.

    Attributes:
        size: Lengths of a patch along the trailing axes, without halo.
        halo: Entries beyond it on either side.
        border: What the halo is where the array ends.
    """

    size: tuple[int, ...]
    halo: tuple[int, ...]
    border: str

    @abc.abstractmethod
    def num_patches(self, shape: tuple[int, ...]) -> int:
        """Patches of an array whose trailing axes have these lengths."""

    @abc.abstractmethod
    def start(self, shape: tuple[int, ...], row: int, patch: int) -> Starts:
        """First entry of a patch, without halo."""

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Lengths with halo."""
        return tuple(n + 2 * h for n, h in zip(self.size, self.halo, strict=True))

    def ranges(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Least and greatest start along every axis.

        Raises:
            ValueError: A patch that is larger than the array.
        """
        found = []
        for length, size, halo in zip(shape, self.size, self.halo, strict=True):
            low = halo if self.border == "inside" else 0
            high = length - size - low
            if high < low or (self.border == "wrap" and size + 2 * halo > length):
                raise ValueError(
                    f"Expected patches of at most the array's {shape}, got {self.size} "
                    f"with a halo of {self.halo} ({self.border}). Pass smaller patches."
                )
            found.append((low, high))
        return found

    def indices(self, shape: tuple[int, ...], start: Starts) -> list[np.ndarray]:
        """Entries of a patch along every axis, the halo included."""
        found = []
        for length, size, halo, at in zip(
            shape, self.size, self.halo, start, strict=True
        ):
            entries = np.arange(at - halo, at + size + halo)
            wraps = self.border == "wrap"
            found.append(entries % length if wraps else np.clip(entries, 0, length - 1))
        return found


@dataclasses.dataclass(frozen=True)
class RegularPatches(AbstractPatches):
    """Patches on a grid of starts; what does not fill a patch at the end is left out.

    Attributes:
        size: Lengths along the trailing axes.
        stride: Distances of starts; None for `size`, patches side by side.
        halo: Entries beyond the patch on either side, one number or one per axis.
        border: "inside" keeps halos within the array, "wrap" for periodic axes, "edge"
            repeats the last entry.

    Raises:
        ValueError: A length, stride or halo out of range, an unknown border.

    Example:
        >>> from trainax_pk.data import RegularPatches
        >>> RegularPatches((4, 4)).num_patches((10, 8))
        4
    """

    size: Sequence[int]
    stride: Sequence[int] | None = None
    halo: int | Sequence[int] = 0
    border: str = "inside"

    def __post_init__(self) -> None:
        _check_patches(self)
        stride = self.size if self.stride is None else tuple(self.stride)
        for n in stride:
            check_count("stride", n)
        _check_length("stride", stride, self.size)
        object.__setattr__(self, "stride", stride)

    def num_patches(self, shape: tuple[int, ...]) -> int:
        """Product over the axes."""
        return math.prod(len(r) for r in self._grid(shape))

    def start(self, shape: tuple[int, ...], row: int, patch: int) -> Starts:
        """The same for every row; the last axis runs fastest."""
        del row
        grid = self._grid(shape)
        return tuple(next(itertools.islice(itertools.product(*grid), patch, None)))

    def _grid(self, shape: tuple[int, ...]) -> list[range]:
        pairs = zip(self.ranges(shape), self.stride, strict=True)
        return [range(low, high + 1, stride) for (low, high), stride in pairs]


@dataclasses.dataclass(frozen=True)
class RandomPatches(AbstractPatches):
    """Patches at random places, a pure function of seed, row and number of the patch.

    Attributes:
        size: Lengths along the trailing axes.
        num_per_row: Patches of one row of the catalog.
        seed: Determines the places.
        halo: As for `RegularPatches`.
        border: As for `RegularPatches`.

    Raises:
        ValueError: A number out of range, an unknown border.

    Example:
        >>> from trainax_pk.data import RandomPatches
        >>> patches = RandomPatches((4, 4), 3)
        >>> patches.start((64, 64), 7, 1) == patches.start((64, 64), 7, 1)
        True
    """

    size: Sequence[int]
    num_per_row: int
    seed: int = 0
    halo: int | Sequence[int] = 0
    border: str = "inside"

    def __post_init__(self) -> None:
        _check_patches(self)
        check_count("num_per_row", self.num_per_row)
        check_count("seed", self.seed, minimum=0)

    def num_patches(self, shape: tuple[int, ...]) -> int:
        """`num_per_row`."""
        self.ranges(shape)
        return self.num_per_row

    def start(self, shape: tuple[int, ...], row: int, patch: int) -> Starts:
        """Uniform over the starts that fit."""
        generator = np.random.default_rng([self.seed, row, patch])
        return tuple(
            int(generator.integers(low, high + 1)) for low, high in self.ranges(shape)
        )


def _check_patches(patches: AbstractPatches) -> None:
    size = tuple(patches.size)
    if not size:
        raise ValueError("Expected `size` to name trailing axes, got none.")
    for n in size:
        check_count("size", n)
    halo = patches.halo
    halo = (halo,) * len(size) if isinstance(halo, int) else tuple(halo)
    for n in halo:
        check_count("halo", n, minimum=0)
    _check_length("halo", halo, size)
    if patches.border not in _BORDERS:
        raise ValueError(
            f"Expected `border` to be one of {_BORDERS}, got {patches.border!r}."
        )
    object.__setattr__(patches, "size", size)
    object.__setattr__(patches, "halo", halo)


def _check_length(name: str, values: Sequence[int], size: Sequence[int]) -> None:
    if len(values) != len(size):
        raise ValueError(
            f"Expected `{name}` with one number for each axis of `size` ({len(size)}), "
            f"got {len(values)}."
        )
