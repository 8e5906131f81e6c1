"""Run files: what is read, what is refused and how that is said."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import example, given, settings

from trainax_pk import experiment
from trainax_pk.experiment._yaml import read_text

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))
GOOD = """\
seed: 1
data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
model: {kind: mlp, width: 8, depth: 1}
configuration:
  kind: supervised
  num_rollout_steps: 2
optimizer:
  kind: adam
  learning_rate: 1e-3
training:
  num_steps: 5
  batch_size: 8
"""


def problems(text, overrides=()):
    with pytest.raises(experiment.RunFileError) as caught:
        experiment.read_run(text, overrides, name="run.yaml")
    return caught.value.problems


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-2", -2), ("+3", 3),
        ("012", 12), ("true", True), ("yes", "yes"), ("off", "off"), ("null", None),
        ("~", None), ("1:30", "1:30"), ("2026-11-21", "2026-11-21"), ("'1'", "1"),
        ('"true"', "true"), ("1_000", "1_000"), ("0x10", "0x10"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_scalars(written, value):
    found = read_text(f"a: {written}").value["a"]
    assert found == value and type(found) is type(value)


def test_lines_are_those_of_the_fields():
    lines = read_text("a: 1\nb:\n  - c: 2\n  - d: 3\n").lines
    assert (lines[("a",)], lines[("b", 1, "d")]) == (1, 4)


def test_a_good_file_and_its_round_trip():
    run = experiment.read_run(GOOD)
    assert run.optimizer.learning_rate == 1e-3 and run.training.num_steps == 5
    text = yaml.safe_dump(run.to_data())
    assert experiment.read_run(text) == run
    assert experiment.Run.model_validate_json(json.dumps(run.to_data())) == run


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_read_and_survive_a_round_trip(path):
    run = experiment.read_run(path)
    assert experiment.read_run(yaml.safe_dump(run.to_data())) == run


REFUSED = [
    ("modle: 3", 1, "modle: unknown field. Did you mean 'model'"),
    (GOOD.replace("width", "widht"), 3, "model.widht: unknown field. Did you mean 'width'"),
    (GOOD.replace("num_steps", "num_step"), 11, "training.num_step: unknown field. Did"),
    (GOOD.replace("1e-3", "'1e-3'"), 9, "quotes is no number"),
    (GOOD.replace("1e-3", "-1"), 9, "expected a number above 0, got -1"),
    (GOOD.replace("1e-3", "yes"), 9, "expected a number above 0"),
    (GOOD.replace("kind: mlp", "kind: mpl"), 3, "model.kind: expected one of mlp"),
    (GOOD.replace("kind: mlp, ", ""), 3, "model.kind: expected one of mlp"),
    (GOOD.replace("{kind: mlp, width: 8, depth: 1}", "7"), 3, "model: expected `kind:`"),
    (GOOD.replace("num_steps: 5", "num_steps: 0"), 11, "training.num_steps: "),
    (GOOD.replace("num_steps: 5", "num_steps: 1.5"), 11, "training.num_steps: "),
    (GOOD.replace("num_steps: 5", "num_steps: true"), 11, "training.num_steps: "),
    (GOOD.replace("  num_steps: 5\n", ""), 10, "either num_steps or num_epochs"),
    (GOOD + "  num_epochs: 3\n", 10, "either num_steps or num_epochs"),
    (GOOD.replace("seed: 1", "seed: -1"), 1, "seed: "),
    (GOOD.replace("seed: 1", "seed: [1]"), 1, "seed: "),
    (GOOD + "seed: 2\n", 13, "expected every field once, got 'seed'"),
    (GOOD.replace("{kind: mlp", "&m {kind: mlp"), 3, "expected no anchor, got &m"),
    (GOOD + "callbacks: *m\n", 13, "expected no alias, got \\*m"),
    (GOOD + "more: !!python/object/apply:os.system ['true']\n", 13, "expected no tag"),
    (GOOD + "more: !Model {}\n", 13, "expected no tag, got !Model"),
    (GOOD + "more: !!int '3'\n", 13, "expected no tag"),
    (GOOD + "---\nseed: 1\n", 13, "expected one document"),
    ("%YAML 1.1\n---\n" + GOOD, 1, "expected no directive"),
    (GOOD + "? [a, b]\n: 1\n", 13, "expected the name of a field"),
    (GOOD.replace("1e-3", "1e999"), 9, "double precision"),
    (GOOD.replace("1e-3", ".inf"), 9, "expected a finite number"),
    (GOOD.replace("1e-3", ".nan"), 9, "expected a finite number"),
    (GOOD.replace("seed: 1", "seed: " + "9" * 40), 1, "at most 18 digits"),
    (GOOD + "more: " + "[" * 40 + "]" * 40 + "\n", 13, "at most 30 levels"),
    (GOOD + "more: [1, 2\n", 14, "got a mistake"),
    (GOOD + "\tmore: 1\n", 13, "got a mistake"),
    (GOOD + "more: \x07\n", 1, "expected YAML"),
    ("", 1, "empty file"),
    ("- 1\n- 2\n", 1, "expected fields"),
    ("just text", 1, "expected fields"),
    ("x" * (2**20 + 1), 1, "at most"),
    (GOOD + "callbacks: {kind: validation, every: 3}\n", 13, "callbacks: "),
    (GOOD + "callbacks:\n  - {kind: validation}\n", 14, "callbacks.0.every: required"),
    (GOOD + "callbacks:\n  - {kind: validation, every: 0}\n", 14, "callbacks.0.every"),
    (GOOD + "early_stopping: {patience: 0}\n", 13, "early_stopping.patience"),
    (GOOD + "early_stopping: {mode: least}\n", 13, "early_stopping.mode: expected"),
    (GOOD + "precision: float16\n", 13, "precision: expected 'float32' or 'float64'"),
    (GOOD.replace("supervised", "diverted"), 5, "Did you mean 'diverted_chain'"),
    (GOOD.replace("rollout_steps: 2", "rollout_steps: 2\n  adjoint: implicit"), 7,
     "configuration.adjoint: expected"),
    (GOOD.replace("rollout_steps: 2", "rollout_steps: 2\n  adjoint: {kind: k_step, k: 0}"),
     7, "configuration.adjoint.k"),
    (GOOD.replace("1e-3", "{kind: cosine, peak: 1, minimum_ratio: 2}"), 9,
     "optimizer.learning_rate.minimum_ratio"),
    (GOOD.replace("1e-3", "{kind: multistep, peak: 1, factor: .5, milestones: [3, 2]}"),
     9, "milestones to ascend"),
    (GOOD.replace("temporal_horizon: 20", "split: [0.5, 0.6, 0.1]"), 2, "sum to 1"),
    (GOOD.replace("temporal_horizon: 20", "split: [1.0, 0.0, 0.0]"), 2, "sum to 1"),
    (GOOD.replace("width: 8", "activation: rleu"), 3, "model.activation: expected"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "message"), REFUSED)
def test_what_is_refused_says_where_and_what_to_do(text, line, message):
    found = problems(text)
    assert any(
        p.startswith(f"run.yaml:{line}: ") and re.search(message, p) for p in found
    ), found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected field=value"),
        ("optimizer.rate.peak=1", "expected a field of run.yaml"),
        ("training.batch_size=x", "training.batch_size: expected"),
        ("callbacks.3.every=1", "expected a field"),
    ],
)
def test_bad_overrides(override, message):
    assert re.search(message, "\n".join(problems(GOOD, [override])))


def test_overrides():
    fields = ["optimizer.learning_rate=2e-4", "training.num_steps=7", "seed=9"]
    run = experiment.read_run(GOOD, fields)
    got = (run.optimizer.learning_rate, run.training.num_steps, run.seed)
    assert got == (2e-4, 7, 9)


_words = st.sampled_from(
    ["kind", "model", "seed", "mlp", "{", "}", "[", "]", ":", ",", "-", "&a", "*a", "!!x",
     "!!python/object/apply:os.system", "\n", "  ", "1e3", "'", '"', "|", ">", "%", "?",
     "null", "optimizer", "learning_rate", "training", "\t", "#", "adam"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(_words, max_size=25), st.integers(0, 12))
@example(["?", "|", "\n", "\n", "kind"], 0)  # a key with line breaks
def test_malformed_files_are_refused_at_once(words, at):
    lines = GOOD.splitlines(keepends=True)
    text = "".join([*lines[:at], " ".join(words) + "\n", *lines[at:]])
    began = time.process_time()
    try:
        run = experiment.read_run(text, name="run.yaml")
    except experiment.RunFileError as error:
        assert all(re.match(r"run\.yaml:\d+: .+", p) for p in error.problems)
    else:
        # Harmless: what was added is blank, a comment, or a valid field.
        assert isinstance(run, experiment.Run)
    assert time.process_time() - began < 1.0


def test_files_that_are_none(tmp_path):
    for path, message in (
        (tmp_path / "missing.yaml", "found none"),
        (tmp_path, "found none"),
    ):
        with pytest.raises(experiment.RunFileError, match=message):
            experiment.read_run(path)
    broken = tmp_path / "broken.yaml"
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(experiment.RunFileError, match="UTF-8"):
        experiment.read_run(broken)
    broken.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(experiment.RunFileError, match="at most"):
        experiment.read_run(broken)


def test_reading_allocates_nothing_and_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    file = tmp_path / "run.yaml"
    file.write_text(
        GOOD + f"more: !!python/object/apply:pathlib.Path.touch ['{marker}']\n"
    )
    script = f"""
import jax
from pathlib import Path
from trainax_pk import experiment
try:
    experiment.read_run(Path({str(file)!r}))
except experiment.RunFileError:
    pass
from jax._src import xla_bridge
raise SystemExit(bool(xla_bridge._backends))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 0 and not marker.exists()


@pytest.mark.parametrize("of", ["run", "sweep"])
def test_schema_knows_every_kind_and_resolves(of):
    schema = experiment.json_schema(of)
    text = json.dumps(schema)
    names = set(schema["$defs"])
    assert set(re.findall(r'"#/\$defs/([^"]+)"', text)) <= names
    for family in (
        "optimizer",
        "schedule",
        "model",
        "configuration",
        "adjoint",
        "data",
        "tracker",
        "sampler",
    ):
        for kind in experiment.kinds_of(family):
            assert f"{family}.{kind}" in names


def test_kinds_have_one_name_each():
    class Nameless(experiment.AbstractSpec):
        size: int

        def build(self):
            """Nothing."""

    with pytest.raises(ValueError, match="to have `kind: Literal"):
        experiment.register("model")(Nameless)
    taken = type(
        "Other", (experiment.kinds_of("model")["mlp"],), {"__qualname__": "Other"}
    )
    with pytest.raises(ValueError, match="Expected a new kind of model, got 'mlp'"):
        experiment.register("model")(taken)
