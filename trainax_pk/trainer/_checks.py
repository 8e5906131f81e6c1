"""What a trainer asks of its arguments before any compute."""

from collections.abc import Sequence

from trainax_pk._tree import check_count
from trainax_pk.callback import AbstractCallback
from trainax_pk.evaluation import EarlyStopping, Monitor
from trainax_pk.tracker import AbstractTracker


def check_callbacks(
    callbacks: Sequence[AbstractCallback],
) -> tuple[AbstractCallback, ...]:
    callbacks = tuple(callbacks)
    for callback in callbacks:
        if not isinstance(callback, AbstractCallback):
            raise ValueError(
                f"Expected callbacks, got {callback!r}. Wrap a function in "
                "tx.callback.Function(function, every, name)."
            )
    names = [c.name for c in callbacks]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(
            f"Expected callbacks with different names, got {repeated} more than once. "
            "Pass `name=`."
        )
    return callbacks


def check_monitors(
    early_stopping: EarlyStopping | str | None,
    monitors: Sequence[Monitor | str],
    callbacks: Sequence[AbstractCallback],
) -> tuple[EarlyStopping | None, tuple[Monitor, ...]]:
    """Rules and monitors with their defaults, of callbacks that there are."""
    if isinstance(early_stopping, str):
        early_stopping = EarlyStopping(early_stopping)
    monitors = (monitors,) if isinstance(monitors, str | Monitor) else monitors
    monitors = tuple(m if isinstance(m, Monitor) else Monitor(m) for m in monitors)
    first = () if early_stopping is None else (early_stopping.monitor,)
    names = [c.name for c in callbacks]
    for monitor in (*first, *monitors):
        for name in monitor.names:
            if not any(name == n or name.startswith((f"{n}[", f"{n}.")) for n in names):
                raise ValueError(
                    f"Expected what a callback reports, got the monitor {name!r} with "
                    f"the callbacks {names}. Add tx.callback.Validation(..., "
                    f"name={name!r}), or name one of these."
                )
    return early_stopping, monitors


def check_skips(max_skipped: int | None, nonfinite: str) -> int | None:
    """A number of skipped updates, where updates are skipped."""
    if max_skipped is None:
        return None
    if nonfinite != "skip":
        raise ValueError(
            f"Expected nonfinite='skip' with `max_skipped`, got {nonfinite!r}. Pass "
            "both, or neither."
        )
    return check_count("max_skipped", max_skipped, minimum=0)


def check_trackers(trackers: Sequence[AbstractTracker]) -> tuple[AbstractTracker, ...]:
    """Trackers, or a ValueError."""
    for tracker in tuple(trackers):
        if not isinstance(tracker, AbstractTracker):
            raise ValueError(
                f"Expected trackers, got {tracker!r}. Pass for example "
                "tx.tracker.TensorBoard(), or a subclass of tx.tracker.AbstractTracker."
            )
    return tuple(trackers)
