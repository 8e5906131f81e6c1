"""The network itself, and anything a function makes of it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from trainax_pk._tree import as_int, check_average
from trainax_pk.callback._base import AbstractCallback, Context, check_callback


class GetNetwork(AbstractCallback):
    """Snapshots of the model; `history.records[name].at(i)` is a model again.

    Attributes:
        every: Number of updates between records.
        use_ema: The moving average instead of the current model; of several the one of
            this number, counted from 1.
        name: Key in `history.records`.

    Raises:
        ValueError: `every` below 1, an empty name.

    Example:
        >>> from trainax_pk.callback import GetNetwork
        >>> GetNetwork(every=100).name
        'network'
    """

    every: int = eqx.field(static=True, converter=as_int)
    use_ema: bool | int = eqx.field(static=True, default=False)
    name: str = eqx.field(static=True, default="network")

    def __check_init__(self) -> None:
        check_callback(self.every, self.name)
        check_average(self.use_ema)

    def __call__(self, context: Context) -> PyTree[Any]:
        """The model."""
        if not self.use_ema:
            return context.model
        return context.state.averaged_model(int(self.use_ema))


class Function(AbstractCallback):
    """A plain function as a callback.

    Attributes:
        function: `(step, model, batch) -> PyTree of numbers and arrays`, the same
            structure, shapes and dtypes every time; `step` is a Python int. It is not
            jitted.
        every: Number of updates between records.
        name: Key in `history.records`.

    Raises:
        ValueError: No callable, `every` below 1, an empty name.

    Example:
        >>> from trainax_pk.callback import Function
        >>> bias = Function(lambda step, model, batch: model.bias, 10, "bias")
        >>> bias.every
        10
    """

    function: Callable[..., Any]
    every: int = eqx.field(static=True, converter=as_int)
    name: str = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_callback(self.every, self.name)
        if not callable(self.function):
            raise ValueError(
                f"Expected `function` to be callable, got {self.function!r}. Pass "
                "(step, model, batch) -> arrays."
            )

    def __call__(self, context: Context) -> PyTree[Any]:
        """What the function returns."""
        return self.function(context.step, context.model, context.batch)
