"""Follows the numbers that callbacks report: what was best, and when to end."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from trainax_pk.checkpoint._writer import Frozen
from trainax_pk.evaluation import EarlyStopping, Monitor, Progress
from trainax_pk.step import TrainState
from trainax_pk.trainer._history import StoredRecord

Freeze = Callable[[], Frozen]


class Watch:
    """Progress of the monitors of one run, and the states that were best.

    Attributes:
        progress: By the monitor's place; the first is that of early stopping, if any.
        states: By step, the best states that were seen in this process.
    """

    def __init__(
        self, monitors: Sequence[Monitor], early_stopping: EarlyStopping | None
    ) -> None:
        # A monitor alone never ends anything.
        self._rules = [] if early_stopping is None else [early_stopping]
        self._rules += [EarlyStopping(m, check_finite=False) for m in monitors]
        self._early_stopping = early_stopping
        self.progress = [Progress() for _ in self._rules]
        self.states: dict[int, TrainState] = {}

    @property
    def reason(self) -> str | None:
        """Why training ends, or None."""
        return None if self._early_stopping is None else self.progress[0].reason

    @property
    def best_steps(self) -> set[int]:
        """Steps of the best states."""
        return {p.best_step for p in self.progress if p.best_step is not None}

    @property
    def restored_step(self) -> int | None:
        """Step of the state to return in the end, or None for the last."""
        rule = self._early_stopping
        return self.progress[0].best_step if rule and rule.restore_best else None

    def restore(self, records: Mapping[str, StoredRecord]) -> None:
        """Follows the evaluations that a run has behind it."""
        by_step: dict[int, dict[str, np.ndarray]] = {}
        for name, record in records.items():
            for i, step in enumerate(record.steps):
                for path, leaf in zip(record.paths, record.leaves, strict=True):
                    if leaf is not None:
                        by_step.setdefault(step, {})[name + path] = leaf[i]
        for step in sorted(by_step):
            self._follow(step, by_step[step])

    def see(
        self, step: int, results: Mapping[str, PyTree[Any]], state: TrainState
    ) -> None:
        """Takes what callbacks returned after `step` updates."""
        if not self._rules:
            return
        wanted = {n for rule in self._rules for n in rule.monitor.names}
        leaves = {
            name + jax.tree_util.keystr(path): x
            for name, result in results.items()
            for path, x in jax.tree_util.tree_leaves_with_path(result)
        }
        _check_reported(wanted, results, leaves)
        self._follow(step, {n: x for n, x in leaves.items() if n in wanted})
        if step in self.best_steps:
            self.states[step] = state
        self.states = {s: x for s, x in self.states.items() if s in self.best_steps}

    def best(self) -> dict[str, tuple[int, float]]:
        """Step and value of the best evaluation, by the monitors' keys."""
        pairs = zip(self._rules, self.progress, strict=True)
        return {
            rule.monitor.key: (p.best_step, p.best_value)
            for rule, p in pairs
            if p.best_step is not None
        }

    def _follow(self, step: int, leaves: Mapping[str, Any]) -> None:
        for i, rule in enumerate(self._rules):
            value = rule.monitor.value(leaves)
            if value is not None:
                self.progress[i] = self.progress[i].after(rule, step, value)


def _check_reported(
    wanted: set[str], results: Mapping[str, PyTree[Any]], leaves: Mapping[str, Any]
) -> None:
    """Refuses to wait for what a callback does not report, at its first evaluation."""
    for name in results:
        own = [n for n in leaves if n == name or n.startswith((f"{name}[", f"{name}."))]
        for n in wanted:
            mine = n == name or n.startswith((f"{name}[", f"{name}."))
            if mine and n not in leaves:
                raise ValueError(
                    f"Expected a monitor of what the callback {name!r} reports, one of "
                    f"{own}, got {n!r}. Name one of them."
                )
