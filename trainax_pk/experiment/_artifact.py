"""What a run leaves behind: weights, and a page that says where they are from."""

import datetime
import functools
import hashlib
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import yaml

import trainax_pk.metrics as metrics
from trainax_pk._files import LocalFiles
from trainax_pk._rollout import rollout
from trainax_pk.callback import Context, Validation
from trainax_pk.checkpoint import RunChanged
from trainax_pk.checkpoint._folder import check_place
from trainax_pk.data import Samples
from trainax_pk.experiment._run import Built, Run, build, check_trackers
from trainax_pk.experiment._weights import hash_weights, name_arrays, save_weights
from trainax_pk.experiment._yaml import RunFileError, read_file
from trainax_pk.step import TrainState

SCHEMA = 1
ARTIFACT = "training-artifact.yaml"
WEIGHTS = "weights.safetensors"
RUN = "run.yaml"
_LIBRARIES = ("trainax_pk", "jax", "jaxlib", "equinox", "optax", "numpy")


def train(
    run: Run | Built, run_dir: str | Path, *, progress: bool = False
) -> tuple[Any, Any, dict[str, Any]]:
    """Trains in a folder and leaves an artifact there.

    A run that was cut off goes on; a finished one is returned at once.

    Args:
        run: The description, or what `build` made of it.
        run_dir: Holds `run.yaml` from the beginning; afterwards `checkpoints/`,
            `metrics.jsonl`, `weights.safetensors` and `training-artifact.yaml`.
        progress: Show a bar.

    Returns:
        The model, the history, and the artifact as data.

    Raises:
        ValueError: As `build`; no path of a folder.
        ImportError: A tracker whose package is not installed.
        RunChanged: The folder holds another run.

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
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model, history, artifact = experiment.train(run, folder)
        ...     same = experiment.reproduce(folder)
        >>> same.is_identical, artifact["backend"]
        (True, 'cpu')
    """
    folder = check_place("run_dir", run_dir)
    check_trackers(run.run if isinstance(run, Built) else run)
    began = time.perf_counter()
    built = run if isinstance(run, Built) else build(run, progress=progress)
    described = yaml.safe_dump(built.run.to_data(), sort_keys=False, width=88).encode()
    files = LocalFiles(folder)
    if is_new := files.size(RUN) is None:
        files.write(RUN, described)
    try:
        model, history = built.train(folder)
    except RunChanged:
        if is_new:
            # The folder is another run's, which came without a file.
            files.remove(RUN)
        raise
    if files.size(RUN) is None or files.read(RUN) != described:
        # Longer than it was begun with, say: the trainer has let it pass. Or someone has
        # removed the folder meanwhile, and the trainer has made it again.
        files.write(RUN, described)
    seconds = time.perf_counter() - began
    kept = read_artifact(folder) if (folder / ARTIFACT).is_file() else None
    if kept and kept["run"] == built.run.to_data():
        # The run had ended before: the page says when, and how long it took.
        if kept["weights"]["sha256"] == hash_weights(model):
            return model, history, kept
    return model, history, write_artifact(built, model, history, seconds, folder)


def write_artifact(
    built: Built, model: Any, history: Any, seconds: float, folder: Path
) -> dict[str, Any]:
    """Leaves weights and artifact in a folder.

    Args:
        built: The run.
        model: Trained.
        history: Of its training.
        seconds: How long that took.
        folder: Where.

    Returns:
        The artifact as data.
    """
    save_weights(model, folder / WEIGHTS)
    artifact = _describe(built, model, history, seconds)
    text = yaml.safe_dump(artifact, sort_keys=False, allow_unicode=True, width=88)
    LocalFiles(folder).write(ARTIFACT, text.encode())
    return artifact


class Reproduction(eqx.Module):
    """How a repeated run compares with its artifact.

    Attributes:
        differences: By part (`dataset`, `pipeline.<field>`, `weights`, `losses`,
            `versions.<name>`, `backend`, `hardware`, `program`), `(recorded, now)`.
        is_identical: Whether weights and losses are the same to the last bit.
    """

    differences: dict[str, tuple[Any, Any]] = eqx.field(static=True)
    is_identical: bool = eqx.field(static=True)


def reproduce(source: str | Path, run: Run | None = None) -> Reproduction:
    """Trains again what an artifact describes, elsewhere, and compares.

    Args:
        source: An artifact, or the folder that holds it.
        run: What to train instead, such as the same with one field changed.

    Returns:
        What differs. Weights are the same to the last bit on the same kind of machine
        with the same versions; elsewhere the differences say why not.

    Raises:
        RunFileError: No artifact, or one of another schema.

    Example:
        >>> import tempfile
        >>> from trainax_pk import experiment
        >>> run = experiment.read_run('''
        ... data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
        ... model: {kind: mlp, width: 8, depth: 1}
        ... configuration: supervised
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_steps: 3, batch_size: 8}
        ... ''')
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = experiment.train(run, folder)
        ...     found = experiment.reproduce(folder, run.model_copy(update={"seed": 1}))
        >>> found.differences["pipeline.seed"]
        (0, 1)
    """
    recorded = read_artifact(source)
    run = Run.model_validate_json(json.dumps(recorded["run"])) if run is None else run
    # The metrics of a repetition are nobody's.
    run = run.model_copy(update={"trackers": ()})
    if run.training.program == "auto" and recorded["program"] in ("loop", "scan"):
        # What was measured there may be measured otherwise here.
        family = {"program": recorded["program"]}
        training = run.training.model_copy(update=family)
        run = run.model_copy(update={"training": training})
    with tempfile.TemporaryDirectory() as folder:
        _, _, now = train(run, folder)
    differences = dict(_differences(recorded, now))
    return Reproduction(
        differences, not any(k in ("weights", "losses") for k in differences)
    )


def read_artifact(source: str | Path) -> dict[str, Any]:
    """An artifact as data.

    Args:
        source: The file, or the folder that holds it.

    Returns:
        Its fields.

    Raises:
        RunFileError: No artifact, or one of another schema.

    Example:
        >>> from trainax_pk import experiment
        >>> try:
        ...     experiment.read_artifact("nowhere")
        ... except experiment.RunFileError as error:
        ...     print(error)
        nowhere:1: expected a file, found none. Check the path.
    """
    path = Path(source)
    path = path / ARTIFACT if path.is_dir() else path
    document = read_file(path)
    found = document.value
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise RunFileError(
            [
                document.problem(
                    ("schema",),
                    f"expected an artifact of schema {SCHEMA}, got {schema!r}. Read it "
                    "with the version of trainax_pk that wrote it.",
                )
            ]
        )
    return found


def _describe(built: Built, model: Any, history: Any, seconds: float) -> dict[str, Any]:
    run = built.run.to_data()
    dataset = hash_weights(built.split.train)
    pipeline = {k: v for k, v in run.items() if k not in ("data", "trackers")}
    canonical = json.dumps(pipeline, sort_keys=True)
    pipeline_hash = hashlib.sha256(canonical.encode()).hexdigest()
    run_id = hashlib.sha256(f"{pipeline_hash} {dataset}".encode()).hexdigest()[:16]
    weights = [x for _, x in name_arrays(model)]
    return {
        "schema": SCHEMA,
        "run_id": run_id,
        "run": run,
        "preprocessing": built.scale and built.scale._asdict(),
        "pipeline_sha256": pipeline_hash,
        "dataset_sha256": dataset,
        "weights": {
            "file": WEIGHTS,
            "sha256": hash_weights(model),
            "num_parameters": int(sum(x.size for x in weights)),
        },
        "losses_sha256": hashlib.sha256(np.asarray(history.loss).tobytes()).hexdigest(),
        "num_updates": int(history.state.step),
        "results": _results(built, model, history),
        # The two families differ in the last bits; which one ran, not why.
        "program": history.program.partition(":")[0],
        "versions": _versions(),
        "backend": jax.default_backend(),
        "hardware": f"{jax.devices()[0].device_kind}, {platform.machine()}, "
        f"{os.cpu_count()} cores",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "duration_seconds": round(seconds, 3),
        "git": _git(os.getcwd()),
    }


def _results(built: Built, model: Any, history: Any) -> dict[str, float]:
    found = {"last_loss": float(history.loss[-1])}
    test = built.split.test
    if isinstance(test, Samples) or not built.run.is_stepper:
        callback = Validation(built.trainer.configuration, test, every=1)
        state = TrainState.create(model, built.trainer.optimizer, key=history.state.key)
        return found | {"test_loss": float(callback(Context(0, state, lambda: None)))}
    if test.state.shape[1] > 1:
        nrmse, mean = _test_errors(model, test.state)
        found["test_nrmse_one_step"] = float(nrmse[0])
        found["test_nrmse_geometric_mean"] = float(mean)
    return found


@eqx.filter_jit
def _test_errors(model: Any, test: jax.Array) -> tuple[jax.Array, jax.Array]:
    """nRMSE by lead time, and its geometric mean over at most 100."""
    steps = test.shape[1] - 1
    keys = jax.random.split(jax.random.key(0), len(test))
    model = eqx.nn.inference_mode(model)
    predicted = jax.vmap(lambda u, k: rollout(model, u, steps, key=k))(test[:, 0], keys)
    nrmse = metrics.nrmse_per_lead_time(predicted, test[:, 1:])
    return nrmse, metrics.geometric_mean(nrmse, horizon=min(100, steps))


@functools.cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in _LIBRARIES
    }


# Once for all trials of a sweep; by folder, which a process may change.
@functools.cache
def _git(folder: str) -> dict[str, Any] | None:
    """Commit of the working folder, None outside of a repository."""

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", folder, *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no")
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Any:
    if old["dataset_sha256"] != new["dataset_sha256"]:
        yield "dataset", (old["dataset_sha256"], new["dataset_sha256"])
    flat = [dict(_flat(x["run"], "")) for x in (old, new)]
    for name in sorted(flat[0].keys() | flat[1].keys()):
        a, b = (f.get(name) for f in flat)
        if a != b and name != "training.program" and not name.startswith("trackers"):
            part = "dataset" if name.startswith("data.") else "pipeline"
            yield f"{part}.{name.removeprefix('data.')}", (a, b)
    for name in new["versions"]:
        a, b = (x["versions"].get(name) for x in (old, new))
        if a != b:
            yield f"versions.{name}", (a, b)
    for name in ("backend", "hardware", "program"):
        if old[name] != new[name]:
            yield name, (old[name], new[name])
    if old["losses_sha256"] != new["losses_sha256"]:
        yield "losses", (old["losses_sha256"], new["losses_sha256"])
    if old["weights"]["sha256"] != new["weights"]["sha256"]:
        yield "weights", (old["weights"]["sha256"], new["weights"]["sha256"])


def _flat(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{place}.{i}")
    else:
        yield place, value
