"""Batches that are simulated inside the compiled training step."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from trainax_pk._types import Window
from trainax_pk.data._simulation_program import Recipe


class SimulatedWindows:
    """Windows that are made when they are gathered: window i is simulation i.

    It stands where `Windows` of device residency do: an engine passes `arrays` to its
    program as an argument and calls `gather(arrays, indices)` in it. There are
    2³¹ − 1 windows, so that a shuffled order never repeats one in practice.

    A failed simulation that is not drawn again (`on_failure="resample"`) reaches the
    loss as NaN, where the train step's policy for non-finite updates meets it.

    Attributes:
        arrays: Arrays of forward model and prior, and the word of the stream.
        residency: "device".
        num_times: Times of a window, or None for pairs.
        time: None, there is no forcing.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> decay = tx.data.StepperModel(lambda u: 0.9 * u, dt=1.0)
        >>> dataset = tx.data.SimulationDataset(
        ...     decay, tx.data.Normal(jnp.zeros(2), 1.0), num_steps=3, on_the_fly=True
        ... )
        >>> windows = dataset.windows()
        >>> windows.gather(windows.arrays, jnp.arange(5)).state.shape
        (5, 4, 2)
    """

    residency = "device"
    time = None

    def __init__(
        self,
        recipe: Recipe,
        word: Any,
        length: int,
        num_times: int | None,
        conditioned: bool,  # noqa: FBT001
    ) -> None:
        arrays, static = eqx.partition(recipe, eqx.is_array)
        self.arrays = (arrays, jnp.asarray(word))
        self.num_times = num_times
        self._length = length
        self._gather = _Gather(static, num_times is not None, conditioned)

    def __len__(self) -> int:
        return self._length

    @property
    def gather(self) -> Callable[[PyTree[Array], Array], Any]:
        """`(arrays, indices) -> batch`, pure; it does not hold the arrays."""
        return self._gather


class _Gather:
    def __init__(
        self,
        static: Any,
        windows: bool,  # noqa: FBT001
        conditioned: bool,  # noqa: FBT001
    ) -> None:
        self._static = static
        self._windows = windows
        self._conditioned = conditioned

    def __call__(self, arrays: PyTree[Array], indices: Array) -> Any:
        recipe = eqx.combine(arrays[0], self._static)
        words = indices.astype(jnp.uint32)
        draw = jax.vmap(lambda i: recipe.draw(arrays[1], i))(words)
        if not self._windows:
            return draw.params, draw.output
        return Window(draw.output, draw.params if self._conditioned else None)
