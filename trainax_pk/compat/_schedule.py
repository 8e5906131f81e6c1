"""Which updates a callback wants to see."""

from typing import Any

from trainax_pk.compat.callback import BaseCallback, CompositeCallback

_NEVER = 2**31 - 1


def interval(callback: Any) -> int:
    """Shortest number of updates between two that the callback wants to see."""
    return min(_intervals(callback), default=_NEVER)


def is_due(callback: Any, i: int) -> bool:
    """Whether the callback wants to see the model before update i."""
    return any(i % every == 0 for every in _intervals(callback))


def absent(callback: Any, i: int) -> dict[str, Any]:
    """What the callback answers at an update where nothing is due."""
    return callback(i, None, None)


def _intervals(callback: Any) -> list[int]:
    """Intervals of a callback's parts; 1 for a function that says nothing of it."""
    if callback is None:
        return []
    if type(callback) is CompositeCallback:
        return [n for part in callback.callbacks for n in _intervals(part)]
    known = isinstance(callback, BaseCallback)
    if known and type(callback).__call__ is BaseCallback.__call__:
        return [callback.every]
    return [1]
