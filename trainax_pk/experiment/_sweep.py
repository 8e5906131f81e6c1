"""Trains the trials of a sweep, ranks them, and goes on where it was cut off."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import yaml

from trainax_pk._files import LocalFiles
from trainax_pk._tree import check_count
from trainax_pk.checkpoint import RunChanged
from trainax_pk.checkpoint._folder import check_place
from trainax_pk.experiment._artifact import read_artifact, write_artifact
from trainax_pk.experiment._members import Members
from trainax_pk.experiment._numbers import can_be_mapped, group_alike
from trainax_pk.experiment._objective import objective
from trainax_pk.experiment._run import (
    Made,
    assemble,
    build_with,
    check_trackers,
    make_data,
)
from trainax_pk.experiment._sweep_spec import HyperSweep, Trial

SWEEP = "sweep.yaml"
RANKING = "ranking.yaml"
_VALUES = "values.yaml"


class Ranked(NamedTuple):
    """What became of a trial.

    Attributes:
        trial: Its number.
        fields: What it had of its own.
        value: What it is ranked by, lower is better; NaN where it failed.
        status: "done", "pruned" or "failed".
        num_updates: How far it was trained.
        folder: Of its run, relative to the sweep's; None without artifact.
    """

    trial: int
    fields: dict[str, Any]
    value: float
    status: str
    num_updates: int
    folder: str | None


def sweep(
    spec: HyperSweep,
    sweep_dir: str | Path,
    *,
    num_devices: int | None = None,
    progress: bool = False,
) -> list[Ranked]:
    """Trains all trials and ranks them.

    Trials that differ in seeds and in real numbers of optimizer and configuration train
    as one program, split over the devices of this process; the others, and those with
    trackers or early stopping, one after another, each in its own run folder. A sweep
    that was killed goes on, on as many devices as there are then: trials that ended are
    not trained again.

    Args:
        spec: The sweep.
        sweep_dir: Holds `ranking.yaml` and `trials/NUMBER/` with an artifact each.
        num_devices: The most that share a program, of which the greatest number that
            divides its trials is used; None for all that there are.
        progress: Show bars.

    Returns:
        Trials, the best first: those that were trained to the end, then those that were
        pruned, then those that failed.

    Raises:
        ValueError: Parts that do not fit each other; more devices than there are; no path
            of a folder.
        ImportError: A tracker whose package is not installed.
        RunChanged: The folder holds another sweep.
        TimeoutError: Another process is at work in it.
        KeyboardInterrupt: SIGINT, after saving; SIGTERM raises SystemExit(143).

    Example:
        >>> import tempfile
        >>> from trainax_pk import experiment
        >>> run = experiment.read_run('''
        ... data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
        ... model: {kind: mlp, width: 8, depth: 1}
        ... configuration: supervised
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_steps: 10, batch_size: 8}
        ... ''')
        >>> fields = {"optimizer.learning_rate": [1e-5, 1e-2], "seed": [0, 1]}
        >>> spec = experiment.HyperSweep(run=run, fields=fields)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ranked = experiment.sweep(spec, folder)
        >>> len(ranked), ranked[0].fields["optimizer.learning_rate"]
        (4, 0.01)
    """
    folder = check_place("sweep_dir", sweep_dir)
    files, devices = LocalFiles(folder), _devices(num_devices)
    check_trackers(spec.run)
    with files.locked(0.0):
        _claim(files, spec)
        log, told = _Log(files), []
        data = _Data(devices)
        while trials := spec.trials(told):
            found = _train(spec, trials, folder, log, data, progress=progress)
            told += [(r.fields, r.value) for r in found]
            log.results += found
        ranked = sorted(log.results, key=_order)
        files.write(RANKING, _yaml([_plain(r) for r in ranked]))
    return ranked


class _Alone:
    """A trial that trains by itself, in its own folder."""

    def __init__(self, spec: HyperSweep, trial: Trial, made: Made, folder: Path):
        self.trials = [trial]
        self.failed: dict[int, int] = {}
        self._spec, self._made, self._folder = spec, made, folder
        self.total = assemble(trial.run, made).clock.total
        self.done = 0
        self._seconds = 0.0
        self._artifact: dict[str, Any] | None = None

    def advance(self, stop: int, *, progress: bool = False) -> dict[int, float]:
        trial, began = self.trials[0], time.perf_counter()
        built = build_with(trial.run, self._made, stop=stop, progress=progress)
        try:
            model, history = built.train(self._folder / trial.name)
        except FloatingPointError:
            self.failed[trial.number] = self.done
            return {trial.number: math.nan}
        self._seconds += time.perf_counter() - began
        self.done = int(history.state.step)
        value = self._value(built, model, history)
        if stop == self.total and not math.isnan(value):
            # At once: models of many trials need not fit on a device together.
            place = self._folder / trial.name
            self._artifact = write_artifact(built, model, history, self._seconds, place)
        return {trial.number: value}

    def keep(self, numbers: set[int]) -> None:
        self.trials = [t for t in self.trials if t.number in numbers]

    def finish(self, trial: Trial, folder: Path) -> dict[str, Any] | None:
        """Its artifact; None where it was finite once and is not when it is repeated."""
        del folder
        if self._artifact is None:
            # An earlier call of the sweep has trained it.
            self.advance(self.total)
        return self._artifact

    def forget(self) -> None:
        """Its folder is its own."""

    def _value(self, built: Any, model: Any, history: Any) -> float:
        state = history.state
        params, buffers = state.split(model)
        state = eqx.tree_at(lambda s: (s.params, s.buffers), state, (params, buffers))
        measure = objective(
            self._spec.rank_by,
            built.trainer.configuration,
            built.split,
            use_ema=self._spec.use_ema,
        )
        return float(measure(state))


class _Data:
    """Data of the trials, those of the same description made once, and the devices."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.devices = devices
        self._made: dict[str, Made] = {}

    def of(self, trial: Trial) -> Made:
        """The data of a trial."""
        kind = trial.run.data.model_dump_json() + trial.run.precision
        if kind not in self._made:
            self._made[kind] = make_data(trial.run)
        return self._made[kind]


class _Log:
    """What is known of trials, on disk: values on the way, and how they ended."""

    def __init__(self, files: LocalFiles) -> None:
        self.results: list[Ranked] = []
        self._files = files
        self.values: dict[str, list[float]] = {}
        if files.size(_VALUES) is not None:
            self.values = yaml.safe_load(files.read(_VALUES))

    def add(self, values: Mapping[int, float]) -> None:
        """Values of trials at the next comparison."""
        for number, value in values.items():
            self.values.setdefault(f"{number:04d}", []).append(value)
        self._files.write(_VALUES, _yaml(self.values))

    def fail(self, trial: Trial) -> None:
        """One that was finite at its end is not, when it is repeated."""
        self.values[trial.name][-1] = math.nan
        self._files.write(_VALUES, _yaml(self.values))


def _train(
    spec: HyperSweep,
    trials: Sequence[Trial],
    folder: Path,
    log: _Log,
    data: _Data,
    *,
    progress: bool,
) -> list[Ranked]:
    """All of a batch of trials, comparison by comparison."""
    shares = (*(spec.pruning.at if spec.pruning else ()), 1.0)
    alive, ended = list(trials), {}
    groups: list[Any] = []
    for i, share in enumerate(shares):
        missing = [t for t in alive if len(log.values.get(t.name, [])) <= i]
        if missing and not groups:
            groups = _groups(spec, alive, folder, data)
        for group in groups:
            _advance(group, share, missing, log, progress=progress)
        values = {t.number: log.values[t.name][i] for t in alive}
        failed = [t for t in alive if math.isnan(values[t.number])]
        kept = [t for t in alive if t not in failed]
        if share < 1.0:
            kept.sort(key=lambda t: (values[t.number], t.number))
            kept = kept[: max(1, math.ceil(spec.pruning.keep * len(kept)))]
        for trial in alive:
            if trial not in kept:
                status = "failed" if trial in failed else "pruned"
                steps = _steps(trial, data, share)
                ended[trial.number] = Ranked(
                    trial.number,
                    trial.fields,
                    values[trial.number],
                    status,
                    steps,
                    None,
                )
        alive = [t for t in alive if t in kept]
        for group in groups:
            group.keep({t.number for t in alive})
        groups = [g for g in groups if g.trials]
    ended |= _finish(spec, alive, groups, folder, log, data)
    return [ended[t.number] for t in trials]


def _advance(
    group: Any, share: float, missing: list[Trial], log: _Log, *, progress: bool
) -> None:
    if any(t in missing for t in group.trials):
        stop = max(1, round(share * group.total))
        log.add(group.advance(stop, progress=progress))


def _steps(trial: Trial, data: _Data, share: float) -> int:
    return max(1, round(share * assemble(trial.run, data.of(trial)).clock.total))


def _groups(
    spec: HyperSweep, trials: Sequence[Trial], folder: Path, data: _Data
) -> list[Any]:
    """Trials that train together, and those that train alone."""
    groups: list[Any] = []
    for digest, alike in group_alike(trials).items():
        made, file = data.of(alike[0]), folder / f"groups/{digest}"
        # One that is left of many goes on where they were.
        several = len(alike) > 1 or file.is_file()
        if spec.together and several and _fits(alike[0], made):
            groups.append(Members(spec, alike, made, file, data.devices))
        else:
            groups += [_Alone(spec, t, made, folder / "trials") for t in alike]
    return groups


def _devices(count: int | None) -> Sequence[jax.Device]:
    """So many devices of this process."""
    found = jax.local_devices()
    if count is None:
        return found
    if check_count("num_devices", count) > len(found):
        raise ValueError(
            f"Expected `num_devices` of at most {len(found)}, as there are, got {count}. "
            "Leave it out to use all."
        )
    return found[:count]


def _fits(trial: Trial, made: Made) -> bool:
    if trial.run.early_stopping is not None or trial.run.trackers:
        return False
    built = build_with(trial.run, made)
    on_device = built.trainer.windows.residency == "device"
    return on_device and can_be_mapped(trial, made, built)


def _finish(
    spec: HyperSweep,
    alive: Sequence[Trial],
    groups: list[Any],
    folder: Path,
    log: _Log,
    data: _Data,
) -> dict[int, Ranked]:
    """Artifacts of those that were trained to the end; ranks are written last."""
    files, ended = LocalFiles(folder), {}
    unfinished = [t for t in alive if files.size(f"trials/{t.name}/trial.yaml") is None]
    if unfinished and not groups:
        # Killed between training and writing: states are on disk, but those of groups
        # that have written everything.
        groups = _groups(spec, unfinished, folder, data)
        for group in groups:
            group.advance(group.total)
    for group in groups:
        for trial in group.trials:
            if trial in unfinished:
                artifact = group.finish(trial, folder / "trials" / trial.name)
                if artifact is None:
                    log.fail(trial)
                    continue
                page = {"fields": trial.fields, "run_id": artifact["run_id"]}
                files.write(f"trials/{trial.name}/trial.yaml", _yaml(page))
        group.forget()
    for trial in alive:
        value = log.values[trial.name][-1]
        if math.isnan(value):
            steps = _steps(trial, data, 1.0)
            ended[trial.number] = Ranked(
                trial.number, trial.fields, value, "failed", steps, None
            )
            continue
        # Fewer than it was asked for where it was stopped early.
        steps = read_artifact(folder / "trials" / trial.name)["num_updates"]
        ended[trial.number] = Ranked(
            trial.number, trial.fields, value, "done", steps, f"trials/{trial.name}"
        )
    return ended


def _claim(files: LocalFiles, spec: HyperSweep) -> None:
    """The folder is this sweep's, or nobody's."""
    described = spec.to_data()
    if files.size(SWEEP) is None:
        files.make()
        files.write(SWEEP, _yaml(described))
        return
    found = yaml.safe_load(files.read(SWEEP))
    if found != described:
        names = [k for k in described if found.get(k) != described[k]]
        raise RunChanged(
            f"Expected {files.root} to hold this sweep, it holds another (fields "
            f"{', '.join(names)}). Choose another --sweep-dir.",
            names,
        )


def _order(r: Ranked) -> Any:
    rank = ("done", "pruned", "failed").index(r.status)
    value = math.inf if math.isnan(r.value) else r.value
    # Lengths may be tried out: one that was trained to its end is as good as its value.
    updates = 0 if r.status == "done" else -r.num_updates
    return rank, updates, value, r.trial


def _plain(r: Ranked) -> dict[str, Any]:
    value = None if math.isnan(r.value) else r.value
    return {**r._asdict(), "value": value}


def _yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False, width=88).encode()
