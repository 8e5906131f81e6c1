"""What a trainer asks of its arguments before any compute."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import PyTree

from trainax_pk._tree import check_count, check_flag
from trainax_pk.callback import AbstractCallback
from trainax_pk.checkpoint import Policy, Segment, Start
from trainax_pk.checkpoint._folder import check_place
from trainax_pk.evaluation import EarlyStopping, Monitor
from trainax_pk.tracker import AbstractTracker


def check_call(model: PyTree[Any], key: Any, *, ensemble: bool) -> None:
    """A model and a key for it, or as many of both."""
    check_flag("ensemble", ensemble)
    count = _num_keys(key)
    if not ensemble and count is not None:
        raise ValueError(
            f"Expected one key for one model, got {count} keys. Pass ensemble=True with "
            "as many models, stacked, or one of the keys."
        )
    if ensemble and count is None:
        raise ValueError(
            "Expected a key for each member of the ensemble, got one key. Pass "
            "jax.random.split(key, number_of_models)."
        )
    for path, x in tree_leaves_with_path(model) if ensemble else ():
        if eqx.is_array(x) and x.shape[:1] != (count,):
            raise ValueError(
                f"Expected models stacked along a leading axis of {count}, one for each "
                f"key, got the shape {list(x.shape)} for model{keystr(path)}. Make them "
                "with eqx.filter_vmap(make_model)(keys)."
            )
    # JAX has no public name for what reverse mode traces with; forward mode works.
    if any(type(x).__name__ == "LinearizeTracer" for x in jax.tree.leaves(model)):
        raise ValueError(
            "Expected a model to train, got one that jax.grad is being taken of: a "
            "trainer cannot be differentiated in reverse. Differentiate a loop over "
            "tx.make_train_step, which is pure."
        )


def _num_keys(key: Any) -> int | None:
    """How many keys an array holds, or None where it is a single one."""
    axes = None
    if eqx.is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        axes = key.shape
    elif eqx.is_array(key) and key.dtype == jnp.uint32 and key.ndim:
        axes = key.shape[:-1]
    if axes is None or len(axes) > 1:
        raise ValueError(
            f"Expected `key` to be a random key, got {key!r}. Pass jax.random.key(0)."
        )
    return axes[0] if axes else None


def check_run(
    run_dir: Any, segment: Any, allow_changes: Any, start: Any
) -> tuple[str, ...]:
    """What a call says of its folder and of others; the fields that may change."""
    if run_dir is not None:
        check_place("run_dir", run_dir)
    if segment is not None and not isinstance(segment, Segment):
        raise ValueError(
            f"Expected `segment` to be a tx.checkpoint.Segment, got {segment!r}. Pass for "
            "example tx.checkpoint.Segment(minutes=55)."
        )
    if segment is not None and run_dir is None:
        raise ValueError(
            "Expected `run_dir` with `segment`, got None. Name the folder from which the "
            "run goes on later."
        )
    if start is not None and not isinstance(start, Start):
        raise ValueError(
            f"Expected `start` to be a tx.checkpoint.Start, got {start!r}. Pass for "
            "example tx.checkpoint.Start(other_run_dir, weights='ema')."
        )
    several = isinstance(allow_changes, Iterable) and not isinstance(allow_changes, str)
    names = tuple(allow_changes) if several else (None,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"Expected `allow_changes` to be names of fields, got {allow_changes!r}. Pass "
            "a list such as ['optimizer']."
        )
    return names


def check_policy(checkpoints: Policy | None) -> Policy:
    """When a run is saved, by default or as asked."""
    if checkpoints is not None and not isinstance(checkpoints, Policy):
        raise ValueError(
            f"Expected `checkpoints` to be a tx.checkpoint.Policy, got {checkpoints!r}. "
            "Pass for example tx.checkpoint.Policy(every_seconds=300)."
        )
    return Policy() if checkpoints is None else checkpoints


def check_parts(batch_size: int, accumulate: int) -> int:
    """A number of parts into which batches can be split."""
    accumulate = check_count("accumulate", accumulate)
    if batch_size % accumulate:
        raise ValueError(
            f"Expected a batch size that `accumulate` ({accumulate}) divides, got "
            f"{batch_size}. Change one of the two."
        )
    return accumulate


def check_callbacks(
    callbacks: Sequence[AbstractCallback], *, averages: int
) -> tuple[AbstractCallback, ...]:
    """Callbacks of different names, and an average where one of them asks for it."""
    if not isinstance(callbacks, Iterable):
        raise ValueError(
            f"Expected a list of callbacks, got {callbacks!r}. Pass callbacks=[...]."
        )
    callbacks = tuple(callbacks)
    for callback in callbacks:
        if not isinstance(callback, AbstractCallback):
            raise ValueError(
                f"Expected callbacks, got {callback!r}. Wrap a function in "
                "tx.callback.Function(function, every, name)."
            )
        number = int(getattr(callback, "use_ema", False))
        if number > averages:
            raise ValueError(
                f"Expected `ema_decay` for the callback {callback.name!r} with "
                f"use_ema={callback.use_ema}, got {averages or None}. Pass for example "
                "ema_decay=0.999 to the trainer, several as (0.99, 0.999), or "
                "use_ema=False."
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
    if early_stopping is not None and not isinstance(early_stopping, EarlyStopping):
        early_stopping = EarlyStopping(early_stopping)
    # A dict is one monitor, too: the weights of a sum.
    one = not isinstance(monitors, Iterable) or isinstance(monitors, str | Mapping)
    monitors = (monitors,) if one else monitors
    monitors = tuple(m if isinstance(m, Monitor) else Monitor(m) for m in monitors)
    first = () if early_stopping is None else (early_stopping.monitor,)
    names = [c.name for c in callbacks]
    keys: dict[str, Monitor] = {}
    for monitor in (*first, *monitors):
        # The same one, for early stopping and for its checkpoint, is no mistake.
        if keys.setdefault(monitor.key, monitor) != monitor:
            raise ValueError(
                f"Expected monitors with different keys in history.best, got {monitor} and "
                f"{keys[monitor.key]}. Pass `label=` to one of them."
            )
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
    if not isinstance(trackers, Iterable):
        raise ValueError(
            f"Expected a list of trackers, got {trackers!r}. Pass trackers=[...]."
        )
    for tracker in tuple(trackers):
        if not isinstance(tracker, AbstractTracker):
            raise ValueError(
                f"Expected trackers, got {tracker!r}. Pass for example "
                "tx.tracker.TensorBoard(), or a subclass of tx.tracker.AbstractTracker."
            )
    return tuple(trackers)
