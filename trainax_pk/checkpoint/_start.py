"""What a run takes over from another one before its first update."""

import dataclasses
import os
from typing import Any, Literal

import equinox as eqx
import jax
from jaxtyping import PyTree

from trainax_pk._tree import check_count, check_flag
from trainax_pk.checkpoint._arrays import compare_leaves, name_leaves, restore_leaf
from trainax_pk.checkpoint._folder import check_path
from trainax_pk.checkpoint._load import Match, find, no_average
from trainax_pk.checkpoint._store import Checkpoint


@dataclasses.dataclass(frozen=True)
class Start:
    """What to begin with from another run: each part on its own.

    Only a run that begins takes anything over; one that goes on has its own checkpoints.
    What was taken is `history.start`, and a line of `events.jsonl`.

    Attributes:
        run_dir: The other run.
        weights: "current", "ema" for its moving average, or None for those of the model
            that the trainer is called with.
        optimizer: Take over the optimizer's state, its count of updates included.
        ema: Take over the moving averages; without, they begin at the weights.
        step: Of which checkpoint; None for the newest.
        partial: Take over what fits in path, shape and dtype, and leave the rest.

    Raises:
        ValueError: No path, unknown weights, a flag or a step that is none, nothing to
            take over.

    Example:
        >>> from trainax_pk.checkpoint import Start
        >>> Start("runs/coarse", weights="ema").optimizer
        False
    """

    run_dir: str | os.PathLike[str]
    weights: Literal["current", "ema"] | None = "current"
    optimizer: bool = False
    ema: bool = False
    step: int | None = None
    partial: bool = False

    def __post_init__(self) -> None:
        if self.weights not in ("current", "ema", None):
            raise ValueError(
                f"Expected `weights` to be 'current', 'ema' or None, got "
                f"{self.weights!r}. Choose one of them."
            )
        for name in ("optimizer", "ema", "partial"):
            check_flag(name, getattr(self, name))
        check_path("run_dir", self.run_dir)
        if self.step is not None:
            check_count("step", self.step, minimum=0)
        if self.weights is None and not (self.optimizer or self.ema):
            raise ValueError(
                "Expected something to take over, got weights=None without `optimizer` "
                "and `ema`. Pass one of them, or no Start."
            )

    def apply(self, state: PyTree[Any]) -> tuple[PyTree[Any], Match]:
        """A training state with the parts of the other run.

        Args:
            state: A `TrainState` before its first update.

        Returns:
            The state, and what matched.

        Raises:
            FileNotFoundError: No checkpoint, or none of that step.
            CheckpointDamaged: None is valid, or that of `step` is not.
            ValueError: Leaves that do not fit, without `partial`; no moving average.
        """
        found = find(check_path("run_dir", self.run_dir), self.step)
        takings, whole = [], state
        for name, *sources in self._parts(found, state):
            if name == "ema" and self.weights is not None:
                whole = _with_averages(whole)
            takings.append(_take(found, whole, name, *sources))
            whole = _replaced(whole, name, takings[-1].tree)
        missing = [f"{p}: {why}" for t in takings for p, why in t.missing.items()]
        unused = [f"{p}: {why}" for t in takings for p, why in t.unused.items()]
        if (missing or unused) and not self.partial:
            lines = "\n  ".join([*missing, *unused])
            raise ValueError(
                f"Expected a run like this one in {self.run_dir}, got differences:\n  "
                f"{lines}\nBuild it as it was, or pass partial=True."
            )
        if self.weights is not None and not self.ema and state.ema is not None:
            whole = _with_averages(whole)
        return whole, Match(
            found.step,
            tuple(p for t in takings for p in t.matched),
            tuple(missing),
            tuple(p for t in takings for p in t.unused),
        )

    def _parts(self, found: Checkpoint, state: PyTree[Any]) -> list[tuple[str, ...]]:
        """Fields of the state, and where they are stored; of a model, in two places.

        What is trained in one run may be frozen in the other.
        """
        parts: list[tuple[str, ...]] = []
        if self.weights is not None:
            source = "state.params" if self.weights == "current" else "state.ema"
            halves = source, "state.buffers"
            parts += [("params", *halves), ("buffers", *reversed(halves))]
        if self.optimizer:
            parts.append(("opt_state", "state.opt_state"))
        if self.ema:
            parts += [("ema", "state.ema"), ("more_ema", "state.more_ema")]
        averages = self.weights == "ema" or self.ema
        if averages and not any(p.startswith("state.ema") for p in found.leaves):
            raise no_average(self.run_dir)
        if self.ema and state.ema is None:
            raise ValueError(
                "Expected `ema_decay` with a Start(ema=True), got None: there is no "
                "average to take over into. Pass ema_decay= to the trainer."
            )
        return parts


@dataclasses.dataclass(frozen=True)
class _Taking:
    """One field of a state, taken from what is stored."""

    name: str
    tree: PyTree[Any]
    matched: tuple[str, ...]
    missing: dict[str, str]
    unused: dict[str, str]


def _with_averages(state: PyTree[Any]) -> PyTree[Any]:
    """Averages that begin at the parameters."""
    others = tuple(state.params for _ in state.more_ema)
    return _replaced(_replaced(state, "ema", state.params), "more_ema", others)


def _places(found: Checkpoint, source: str) -> dict[str, str]:
    """Where the leaves of a stored field are, by their paths in it."""
    return {
        path.removeprefix(source): path
        for path in found.leaves
        if path.startswith((f"{source}.", f"{source}[")) or path == source
    }


def _take(
    found: Checkpoint,
    state: PyTree[Any],
    name: str,
    source: str,
    beside: str | None = None,
) -> _Taking:
    template = getattr(state, name)
    asked = name_leaves(template, "")
    places = _places(found, source)
    if beside is not None:
        other = state.buffers if name == "params" else state.params
        elsewhere = name_leaves(other, "")
        places = {p: place for p, place in places.items() if p not in elsewhere}
        found_beside = _places(found, beside).items()
        places |= {p: q for p, q in found_beside if p in asked and p not in places}
    stored = {short: found.leaves[path] for short, path in places.items()}
    differences = compare_leaves(stored, template, "")

    def take(path: Any, like: Any) -> Any:
        short = jax.tree_util.keystr(path)
        if short in differences:
            return like
        return restore_leaf(found.arrays[places[short]], like)

    return _Taking(
        name,
        jax.tree_util.tree_map_with_path(take, template),
        tuple(f".{name}{p}" for p in asked if p not in differences),
        {f".{name}{p}": why for p, why in differences.items() if p in asked},
        {f".{name}{p}": why for p, why in differences.items() if p not in asked},
    )


def _replaced(state: PyTree[Any], name: str, tree: PyTree[Any]) -> PyTree[Any]:
    # The state owns its arrays, each once.
    own = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, tree)
    return dataclasses.replace(state, **{name: own})
