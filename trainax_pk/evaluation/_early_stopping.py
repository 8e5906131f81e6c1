"""When training has got as far as it will, and which model was best."""

import dataclasses
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal

import numpy as np

from trainax_pk._tree import check_count, check_flag

Mode = Literal["min", "max"]


@dataclasses.dataclass(frozen=True)
class Monitor:
    """A number that callbacks report, by which models are compared.

    Attributes:
        name: Name of a callback whose result is a scalar, such as "validation"; of a leaf
            of one, such as "rollout['nrmse']", whose mean is taken; or weights by name,
            `{"rollout['nrmse']": 1.0, "validation": 0.1}`, whose sum is compared where all
            of them are reported after the same update: callbacks count their `every` in
            updates, so that is at common multiples, before the first and after the last.
        mode: "min" or "max".
        min_delta: What counts as an improvement, at least.
        label: Key in `history.best`; None for the names, joined by " + ". Monitors that
            differ need different ones.

    Raises:
        ValueError: No name, an unknown mode, a number out of its range.

    Example:
        >>> from trainax_pk.evaluation import Monitor
        >>> Monitor("validation").names
        ('validation',)
    """

    name: str | Mapping[str, float]
    mode: Mode = "min"
    min_delta: float = 0.0
    label: str | None = None

    def __post_init__(self) -> None:
        known = isinstance(self.name, str | Mapping) and self.names
        if not known or not all(isinstance(n, str) and n for n in self.names):
            raise ValueError(
                f"Expected `name` to name what callbacks return, got {self.name!r}. Pass "
                "for example 'validation'."
            )
        if self.mode not in ("min", "max"):
            raise ValueError(
                f"Expected `mode` to be 'min' or 'max', got {self.mode!r}. Choose one of "
                "them."
            )
        _check_number("min_delta", self.min_delta, least=0.0)
        for name, weight in self.name.items() if isinstance(self.name, Mapping) else ():
            _check_number(f"name[{name!r}]", weight)
        if self.label is not None and not (self.label and isinstance(self.label, str)):
            raise ValueError(
                f"Expected `label` to be a non-empty string, got {self.label!r}. Pass None "
                "for the names."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """What has to be reported."""
        return (self.name,) if isinstance(self.name, str) else tuple(self.name)

    @property
    def key(self) -> str:
        """What `history.best` calls it."""
        return self.label or " + ".join(self.names)

    def value(self, results: Mapping[str, Any]) -> float | None:
        """The number, from leaves of results by name; None if one was not reported."""
        weights = {self.name: 1.0} if isinstance(self.name, str) else self.name
        if not all(name in results for name in weights):
            return None
        return sum(
            float(np.mean(np.asarray(results[n]))) * w for n, w in weights.items()
        )

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value improves on another; NaN and infinity never do."""
        if not math.isfinite(value):
            return False
        if than is None:
            return True
        gain = than - value if self.mode == "min" else value - than
        return gain > self.min_delta


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Ends training when a monitored number no longer improves.

    Attributes:
        monitor: What is compared; a name stands for `Monitor(name)`.
        patience: Evaluations without improvement after which training ends.
        check_finite: End when the number is not finite.
        stopping_threshold: End when the number is as good as this.
        divergence_threshold: End when it is worse than this.
        restore_best: Return the model of the best evaluation.

    Raises:
        ValueError: A number out of its range.

    Example:
        >>> from trainax_pk.evaluation import EarlyStopping
        >>> EarlyStopping("validation", patience=5).monitor.mode
        'min'
    """

    monitor: Monitor | str
    patience: int = 3
    check_finite: bool = True
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None
    restore_best: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, Monitor):
            object.__setattr__(self, "monitor", Monitor(self.monitor))
        check_count("patience", self.patience)
        check_flag("check_finite", self.check_finite)
        check_flag("restore_best", self.restore_best)
        for name in ("stopping_threshold", "divergence_threshold"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come by what is monitored: a function of its evaluations alone.

    So nothing of it has to be saved: a run that goes on follows its evaluations again.

    Attributes:
        best_step: Updates done at the best evaluation, or None.
        best_value: Its value.
        num_worse: Evaluations since.
        reason: Why training ends, or None.

    Example:
        >>> from trainax_pk.evaluation import EarlyStopping, Progress
        >>> rule, progress = EarlyStopping("validation", patience=2), Progress()
        >>> for step, value in ((0, 1.0), (10, 0.5), (20, 0.6), (30, 0.7)):
        ...     progress = progress.after(rule, step, value)
        >>> progress.best_step, progress.reason
        (10, 'no improvement in 2 evaluations')
    """

    best_step: int | None = None
    best_value: float | None = None
    num_worse: int = 0
    reason: str | None = None

    def after(self, rule: EarlyStopping, step: int, value: float) -> "Progress":
        """Progress after one more evaluation."""
        monitor = rule.monitor
        better = monitor.is_better(value, self.best_value)
        best = (step, value, 0)
        kept = (self.best_step, self.best_value, self.num_worse + 1)
        new = Progress(*(best if better else kept))
        return dataclasses.replace(new, reason=_reason(rule, new, value))


def _reason(rule: EarlyStopping, progress: Progress, value: float) -> str | None:
    sign = 1.0 if rule.monitor.mode == "min" else -1.0
    if rule.check_finite and not math.isfinite(value):
        return f"the monitored number is {value}"
    aim, limit = rule.stopping_threshold, rule.divergence_threshold
    if aim is not None and sign * value <= sign * aim:
        return f"the monitored number, {value:.6g}, has reached {aim:.6g}"
    if limit is not None and sign * value > sign * limit:
        return f"the monitored number, {value:.6g}, is worse than {limit:.6g}"
    if progress.num_worse >= rule.patience:
        return f"no improvement in {progress.num_worse} evaluations"
    return None


def _check_number(name: str, value: Any, *, least: float = -math.inf) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not least <= value < math.inf:
        raise ValueError(
            f"Expected `{name}` to be a finite number"
            f"{f' >= {least:g}' if least > -math.inf else ''}, got {value!r}. Pass a "
            "float."
        )
