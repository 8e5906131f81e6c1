"""What a sweep is: a run, and the fields of it that are tried out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import Field

from trainax_pk.experiment._read import (
    as_typed,
    place_of,
    read_document,
    replaced,
)
from trainax_pk.experiment._run import Run, read_run
from trainax_pk.experiment._sampler import Grid
from trainax_pk.experiment._spec import AbstractSpec, Family, problems

Share = Annotated[float, Field(gt=0, lt=1)]
Values = Annotated[AbstractSpec, Family("values")]


class Pruning(pydantic.BaseModel):
    """Successive halving (arXiv:1502.07943): who is worse on the way ends there.

    Attributes:
        at: Shares of the run after which trials are compared.
        keep: Share of the trials that goes on, the best; one at least.
    """

    model_config = AbstractSpec.model_config

    at: Annotated[tuple[Share, ...], Field(min_length=1)]
    keep: Share = 0.5

    @pydantic.field_validator("at")
    @classmethod
    def _ascend(cls, at: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in zip(at, at[1:], strict=False)):
            raise ValueError(f"expected shares that ascend, got {at}. Sort them.")
        return at


class Trial(NamedTuple):
    """One run of a sweep.

    Attributes:
        number: Its place in the sweep.
        fields: What it has of its own.
        run: The whole description.
    """

    number: int
    fields: dict[str, Any]
    run: Run

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.number:04d}"


class HyperSweep(pydantic.BaseModel):
    """A run, and the fields of it that are tried out.

    Attributes:
        run: What all trials have in common; in a file, the path of a run file will do.
        fields: By dotted name (`optimizer.learning_rate`, `seed`), a list of values, or a
            range: `{kind: log_uniform, low: 1e-4, high: 1e-1, num: 16}`.
        sampler: How values are combined: `grid`, `random`, `optuna`.
        rank_by: "validation" (loss on the validation data) or "rollout" (geometric mean
            of the nRMSE over rollouts of the validation trajectories).
        use_ema: Rank the moving averages of the weights.
        pruning: When bad trials end; None for never.
        together: Train trials as one program where they differ in seeds and numbers
            alone; or else each for itself.

    Example:
        >>> from trainax_pk import experiment
        >>> run = experiment.read_run('''
        ... data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
        ... model: {kind: mlp, width: 8, depth: 1}
        ... configuration: supervised
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_steps: 10, batch_size: 8}
        ... ''')
        >>> spec = experiment.HyperSweep(run=run, fields={"seed": [0, 1, 2]})
        >>> [trial.run.seed for trial in spec.trials([])]
        [0, 1, 2]
    """

    model_config = AbstractSpec.model_config

    run: Run
    fields: Annotated[dict[str, Values], Field(min_length=1)]
    sampler: Annotated[AbstractSpec, Family("sampler")] = Grid()
    rank_by: Literal["validation", "rollout"] = "validation"
    use_ema: bool = False
    pruning: Pruning | None = None
    together: bool = True

    @pydantic.field_validator("fields", mode="before")
    @classmethod
    def _lists(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {
            name: {"kind": "choice", "options": list(values)}
            if isinstance(values, list | tuple)
            else values
            for name, values in fields.items()
        }

    @pydantic.model_validator(mode="after")
    def _known(self) -> "HyperSweep":
        described = self.run.to_data()
        for name in self.fields:
            if not _exists(described, name):
                raise ValueError(
                    f"expected fields of the run, got {name!r}. `trainax-pk show` lists "
                    "them."
                )
        if (
            self.rank_by == "rollout"
            and getattr(self.run.data, "gives", "states") != "states"
        ):
            raise ValueError(
                f"expected trajectories of states to rank by rollout, got data "
                f"{self.run.data.kind}. Rank by validation."
            )
        if self.rank_by == "rollout" and not self.run.is_stepper:
            raise ValueError(
                f"expected a model that steps to rank by rollout, got "
                f"{self.run.model.kind}. Rank by validation."
            )
        if self.use_ema and self.run.training.ema_decay is None:
            raise ValueError(
                "expected training.ema_decay with use_ema, got none. Set it."
            )
        return self

    def to_data(self) -> dict[str, Any]:
        """As a file would have it, every field written out."""
        return self.model_dump(mode="json")

    def trials(self, told: Sequence[tuple[dict[str, Any], float]]) -> list[Trial]:
        """The trials that come next.

        Args:
            told: Fields and values of those that ended.

        Returns:
            Trials, numbered from `len(told)`; none at the end.

        Raises:
            ValueError: Values that do not make a run.
        """
        asked = self.sampler.build(self.fields, told)
        base = self.run.to_data()
        first = len(told)
        return [Trial(first + i, f, _run_with(base, f)) for i, f in enumerate(asked)]


def read_sweep(
    source: str | Path, overrides: Sequence[str] = (), *, name: str = ""
) -> HyperSweep:
    """A sweep from a YAML file, or from YAML as text.

    Args:
        source: A `Path`, or a text of YAML.
        overrides: Fields to replace, `"run.training.num_steps=100"`.
        name: What messages call a text.

    Returns:
        The sweep.

    Raises:
        RunFileError: As `read_run`.

    Example:
        >>> from trainax_pk import experiment
        >>> try:
        ...     experiment.read_sweep("run: missing.yaml")
        ... except experiment.RunFileError as error:
        ...     print(error.problems[0])
        missing.yaml:1: expected a file, found none. Check the path.
    """
    document = read_document(source)
    path = document.value.get("run")
    if isinstance(path, str):
        folder = source.parent if isinstance(source, Path) else Path()
        described = read_run(folder / path).to_data()
        document = document._replace(value={**document.value, "run": described})
    if overrides:
        changed = read_document(
            yaml_of(document.value), overrides, name=name or document.name
        )
        document = document._replace(value=changed.value)
    return as_typed(HyperSweep, document)


def yaml_of(value: Any) -> str:
    """Data as YAML: JSON is that."""
    return json.dumps(value, indent=1)


def _exists(value: Any, name: str) -> bool:
    try:
        for part in place_of(name):
            value = value[part]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _run_with(base: dict[str, Any], fields: dict[str, Any]) -> Run:
    value: Any = base
    for name, new in fields.items():
        value = replaced(value, place_of(name), new)
    try:
        return Run.model_validate_json(json.dumps(value))
    except pydantic.ValidationError as error:
        lines = [f"{'.'.join(map(str, p))}: {text}" for p, text in problems(error)]
        raise ValueError(f"With {fields}: {'; '.join(lines)}") from None
