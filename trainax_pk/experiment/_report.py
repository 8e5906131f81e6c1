"""A run as one page that opens anywhere: curves, rollouts, adjoints, environment."""

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import yaml

import trainax_pk.metrics as metrics
from trainax_pk._files import LocalFiles
from trainax_pk._rollout import rollout
from trainax_pk.checkpoint import read_metrics
from trainax_pk.data import Samples
from trainax_pk.experiment._adjoints import compare_adjoints
from trainax_pk.experiment._artifact import read_artifact
from trainax_pk.experiment._operator import load_operator
from trainax_pk.experiment._report_plot import (
    plot_curves,
    plot_errors,
    plot_rollout,
)
from trainax_pk.experiment._run import Run, build

REPORT = "report.html"
# A rollout that left the attractor tells nothing more.
_LONGEST = 200
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
table {{ border-collapse: collapse; font-size: 0.9rem }}
td, th {{ padding: 0.2rem 0.8rem 0.2rem 0; text-align: left;
         border-bottom: 1px solid #ddd; vertical-align: top }}
pre {{ background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem }}
img {{ max-width: 100%; display: block }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def report(run_dir: str | Path, *, rounds: int = 5) -> Path:
    """Writes a page about a finished run: one file that needs no network.

    Curves of its metric log, rollouts of the test data, cost and gradient of the adjoints
    on its loss, the run file, and the environment it was trained in.

    Args:
        run_dir: A folder that `train` or `sweep` left.
        rounds: Of timing of the adjoints; 0 for none.

    Returns:
        The page, `report.html` in the folder.

    Raises:
        RunFileError: No artifact.
        ArtifactDamaged: Weights that are not the recorded ones.
        ImportError: matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from trainax_pk import experiment
        >>> run = experiment.read_run('''
        ... data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
        ... model: {kind: mlp, width: 8, depth: 1}
        ... configuration: supervised
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_steps: 10, batch_size: 8, log_every: 2}
        ... ''')
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = experiment.train(run, folder)
        ...     page = experiment.report(folder, rounds=0).read_text()
        >>> page.count('src="data:image/png;base64'), "http" in page
        (3, False)
    """
    folder = Path(run_dir).expanduser().absolute()
    artifact = read_artifact(folder)
    model = load_operator(folder).model
    built = build(Run.model_validate_json(json.dumps(artifact["run"])))
    adjoints = compare_adjoints(built, model, rounds=rounds)
    parts = [
        _section("Results", _table(_results(artifact))),
        _section("Curves", *_curves(folder)),
    ]
    if not isinstance(built.split.test, Samples) and built.run.is_stepper:
        parts.append(_section("Rollouts of the test data", *_rollouts(built, model)))
    if adjoints is not None:
        parts.append(_section("Adjoints", _adjoint_table(adjoints.data())))
    text = yaml.safe_dump(artifact["run"], sort_keys=False, width=88)
    parts += [
        _section("Run", f"<pre>{html.escape(text)}</pre>"),
        _section("Environment", _table(_environment(artifact))),
    ]
    title = f"Run {artifact['run_id']}"
    page = _PAGE.format(title=title, body="\n".join(parts))
    LocalFiles(folder).write(REPORT, page.encode())
    return folder / REPORT


def _results(artifact: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    yield "updates", artifact["num_updates"]
    yield "parameters", artifact["weights"]["num_parameters"]
    for name, value in artifact["results"].items():
        yield name.replace("_", " "), f"{value:.6g}"
    yield "duration", f"{artifact['duration_seconds']:.1f} s"
    yield "date", artifact["date"]


def _environment(artifact: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    yield "hardware", artifact["hardware"]
    yield "backend", artifact["backend"]
    yield "program", artifact["program"]
    yield from artifact["versions"].items()
    if artifact["git"]:
        changed = " (changed)" if artifact["git"]["changed"] else ""
        yield "commit", artifact["git"]["commit"] + changed
    for name in ("pipeline_sha256", "dataset_sha256", "losses_sha256"):
        yield name.replace("_", " "), artifact[name]
    yield "weights sha256", artifact["weights"]["sha256"]


def _curves(folder: Path) -> Iterable[str]:
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "callback") and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    if not curves:
        yield "<p>None were logged: <code>log_every</code> exceeds the run.</p>"
        return
    yield _image(plot_curves(curves), "numbers over updates")


def _rollouts(built: Any, model: Any) -> Iterable[str]:
    test = built.split.test.state[:, : _LONGEST + 1]
    steps = test.shape[1] - 1
    keys = jax.random.split(jax.random.key(0), len(test))
    model = eqx.nn.inference_mode(model)
    roll = jax.jit(jax.vmap(lambda u, k: rollout(model, u, steps, key=k)))
    predicted = roll(test[:, 0], keys)
    truth = np.asarray(test[:, 1:])
    nrmse = np.asarray(metrics.nrmse_per_lead_time(predicted, test[:, 1:]))
    yield _image(plot_rollout(truth[0], np.asarray(predicted)[0]), "a rollout")
    yield _image(plot_errors(nrmse), "errors over lead times")


def _adjoint_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ("adjoint", "cosine", "norm ratio", "temporaries, bytes", "time")
    cells = [
        (
            row["adjoint"],
            f"{row['cosine']:.4f}",
            f"{row['norm_ratio']:.4f}",
            row["temporary_bytes"],
            "-" if row["seconds"] is None else f"{1e3 * row['seconds']:.2f} ms",
        )
        for row in rows
    ]
    head = "".join(f"<th>{x}</th>" for x in header)
    note = "<p>Of the gradient on one batch, compared with the first row.</p>"
    return f"{note}<table><tr>{head}</tr>{''.join(map(_row, cells))}</table>"


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<h2>{html.escape(title)}</h2>", *parts])


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    return f"<table>{''.join(map(_row, rows))}</table>"


def _row(cells: Iterable[Any]) -> str:
    return f"<tr>{''.join(f'<td>{html.escape(str(x))}</td>' for x in cells)}</tr>"


def _image(uri: str, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="{uri}">'
