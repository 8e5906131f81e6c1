"""Which trials of a sweep are one program: those that differ in numbers and seeds."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from trainax_pk.engine import AbstractFeed
from trainax_pk.engine._feed_base import AbstractBesideFeed
from trainax_pk.experiment._read import place_of, replaced
from trainax_pk.experiment._run import Built, Made, Parts, Run, assemble, make_model
from trainax_pk.experiment._sweep_spec import Trial
from trainax_pk.step import TrainState, make_train_step

# Parts whose numbers an update reads. Those of data and model fix what is built.
_MAPPED = ("optimizer", "configuration")


class NumberedFeed(AbstractBesideFeed):
    """Batches `(numbers, batch)`: a member's own numbers come with its order.

    Attributes:
        feed: Where the batches come from.
    """

    feed: AbstractFeed

    def load(self, order: Any, start: int, count: int, size: int) -> PyTree[Array]:
        """The feed's arrays, and the numbers."""
        numbers, order = order
        return self.feed.load(order, start, count, size), numbers


def group_alike(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Trials that differ in seeds and in real numbers of optimizer and configuration,
    by a digest of what they have in common."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        rest: Any = {**trial.run.to_data(), "seed": 0}
        for name in _numbers(trial):
            rest = replaced(rest, place_of(name), "a number")
        common = json.dumps(rest, sort_keys=True).encode()
        groups.setdefault(hashlib.sha256(common).hexdigest()[:16], []).append(trial)
    return groups


def numbers_of(trials: Sequence[Trial]) -> dict[str, jax.Array]:
    """Their numbers by field, each `(len(trials),)`."""
    names = _numbers(trials[0])
    values = [[_at(t.run.to_data(), n) for t in trials] for n in names]
    return {n: jnp.asarray(v) for n, v in zip(names, values, strict=True)}


def with_numbers(run: Run, numbers: dict[str, Any]) -> Run:
    """A run with other numbers, which may be traced: nothing is checked."""
    for name, value in numbers.items():
        run = _with(run, place_of(name), value)
    return run


def can_be_mapped(trial: Trial, made: Made, built: Built) -> bool:
    """Whether one update can be traced with the numbers as operands, and models mapped.

    Some numbers are compared, or fix a shape, when a program is built: then JAX refuses.
    """
    run, windows = trial.run, built.trainer.windows
    numbers = {n: v[0] for n, v in numbers_of([trial]).items()}

    def update(numbers: dict[str, Any]) -> jax.Array:
        parts = assemble(with_numbers(run, numbers), made)
        ema = run.training.ema_decay is not None
        state = TrainState.create(built.model, parts.optimizer, key=built.key, ema=ema)
        indices = jnp.zeros(run.training.batch_size, jnp.int32)
        batch = windows.gather(windows.arrays, indices)
        return step_of(run, parts)(state, batch)[1].loss

    try:
        jax.eval_shape(update, numbers)
        # Networks of other frameworks may draw their weights by a seed that is a number.
        make = eqx.filter_vmap(lambda key: make_model(run, key))
        try:
            eqx.filter_eval_shape(make, built.key[None])
        except TypeError:
            # Some read numbers that are no function of the key: they have to be made.
            make(built.key[None])
    except (TypeError, ValueError):
        # JAX's own errors of this are TypeErrors; checks of a number raise either. What
        # is wrong for another reason says so when the trial trains by itself.
        return False
    return True


def step_of(run: Run, parts: Parts) -> Any:
    """One update of a run."""
    nonfinite = run.training.nonfinite
    return make_train_step(
        parts.configuration,
        parts.optimizer,
        nonfinite="ignore" if nonfinite == "raise" else nonfinite,
        **run.training.options(),
    )


def finite_rows(params: PyTree[Array]) -> np.ndarray:
    """Which members have finite weights alone, `(members,)`."""
    found = [
        jnp.all(jnp.isfinite(x.reshape(x.shape[0], -1)), axis=1)
        for x in jax.tree.leaves(params)
    ]
    return np.asarray(jnp.stack(found).all(axis=0))


def _numbers(trial: Trial) -> list[str]:
    data = trial.run.to_data()
    return [
        name
        for name in trial.fields
        if name.split(".")[0] in _MAPPED and isinstance(_at(data, name), float)
    ]


def _at(value: Any, name: str) -> Any:
    for part in place_of(name):
        value = value[part]
    return value


def _with(part: Any, place: tuple[str | int, ...], new: Any) -> Any:
    if not place:
        return new
    first, rest = place[0], place[1:]
    if isinstance(part, tuple):
        return tuple(
            _with(x, rest, new) if i == first else x for i, x in enumerate(part)
        )
    inner = _with(getattr(part, str(first)), rest, new)
    return part.model_copy(update={first: inner})
