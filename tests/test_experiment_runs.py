"""From file to artifact and back: training, reproduction, operators, the command line."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import trainax_pk as tx
from trainax_pk import experiment
from trainax_pk.__main__ import main
from trainax_pk.experiment import _artifact

ROOT = Path(__file__).resolve().parent.parent
TEXT = """\
precision: float64
data: {kind: advection_1d, num_points: 12, num_samples: 10, temporal_horizon: 6}
model: {kind: conv, hidden_channels: 2, depth: 1}
configuration: {kind: supervised, num_rollout_steps: 2}
optimizer: {kind: adam, learning_rate: {kind: cosine, peak: 1e-2}}
training: {num_epochs: 3, batch_size: 8, ema_decay: 0.9}
callbacks: [{kind: validation, every: 5}, {kind: rollout, every: 6}]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = experiment.read_run(TEXT)
    return folder, run, *experiment.train(run, folder)


@pytest.fixture(autouse=True)
def _keep_precision():
    yield
    jax.config.update("jax_enable_x64", True)


def test_a_run_is_the_trainer_it_describes(trained):
    _, run, model, history, artifact = trained
    split = run.data.build()
    first, key = jax.random.split(jax.random.key(0))
    rollout = {"nrmse": tx.metrics.nrmse_per_lead_time}
    configuration = tx.configuration.Supervised(2)
    trainer = tx.trainer.Trainer(
        split.train, configuration, num_training_steps=12, batch_size=8, ema_decay=0.9,
        optimizer=experiment.kinds_of("optimizer")["adam"](
            learning_rate=run.optimizer.learning_rate
        ).build(experiment.build(run).run.training.clock(32)),
        callbacks=[
            tx.callback.Validation(configuration, split.validation, every=5),
            tx.callback.RolloutMetrics(split.validation, rollout, every=6),
        ],
        progress=False,
    )  # fmt: skip
    same, expected = trainer(run.model.build((1, 12), first), key=key)
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-10)
    assert history.loss.shape == (12,)
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(same), strict=True):
        if isinstance(ours, jax.Array):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        history.records["validation"].values, expected.records["validation"].values,
        rtol=1e-9,
    )  # fmt: skip
    assert artifact["num_updates"] == 12 and artifact["results"]["last_loss"] > 0


def test_a_finished_run_is_returned_and_its_artifact_the_same(trained):
    folder, run, model, _, artifact = trained
    _, _, again = experiment.train(run, folder)
    assert again == artifact
    with pytest.raises(
        tx.checkpoint.RunChanged, match="learning_rate|schedule|peak|opt"
    ):
        changed = experiment.read_run(TEXT, ["optimizer.learning_rate=3e-3"])
        experiment.train(changed, folder)


def test_an_artifact_is_a_page_of_plain_yaml(trained):
    folder, run, _, _, artifact = trained
    text = (folder / experiment.ARTIFACT).read_text()
    assert yaml.safe_load(text) == artifact == experiment.read_artifact(folder)
    assert experiment.Run.model_validate_json(json.dumps(artifact["run"])) == run


def test_reproduction_is_identical_or_says_what_differs(trained):
    folder, *_, artifact = trained
    same = experiment.reproduce(folder)
    assert same.is_identical and not same.differences
    changed = experiment.read_run(
        yaml.safe_dump(artifact["run"]), ["data.cfl=0.7", "optimizer.b1=0.8"]
    )
    found = experiment.reproduce(folder, changed)
    assert not found.is_identical
    assert found.differences["dataset.cfl"] == (0.75, 0.7)
    assert found.differences["pipeline.optimizer.b1"] == (0.9, 0.8)
    assert {"dataset", "weights", "losses"} < set(found.differences)


def test_trackers_see_a_run_and_change_nothing(trained, tmp_path):
    *_, artifact = trained
    text = TEXT + "trackers: [{kind: tensorboard, name: events}]\n"
    run = experiment.read_run(text)
    _, history, tracked = experiment.train(run, tmp_path)
    events = (tmp_path / "events").glob("events*")
    data = b"".join(path.read_bytes() for path in events)
    assert b"validation" in data and b"geometric_mean" in data
    assert history.loss.shape == (12,)
    for name in ("run_id", "pipeline_sha256", "losses_sha256"):
        assert tracked[name] == artifact[name]
    assert tracked["weights"]["sha256"] == artifact["weights"]["sha256"]
    same = experiment.reproduce(tmp_path, experiment.read_run(TEXT))
    assert same.is_identical and not same.differences


@pytest.mark.slow
def test_an_operator_in_a_fresh_process(trained):
    folder, _, model, *_ = trained
    u = jnp.sin(jnp.arange(12.0))[None]
    script = f"""
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
from trainax_pk import experiment
operator = experiment.load_operator({str(folder)!r})
print(operator(jnp.sin(jnp.arange(12.0))[None]).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    np.testing.assert_allclose(json.loads(done.stdout), model(u), rtol=1e-12)


def test_an_operator_stands_where_a_stepper_may(trained):
    folder, _, model, *_ = trained
    operator = experiment.load_operator(folder)
    u = jnp.sin(jnp.arange(12.0))[None]
    found = tx.rollout(operator, u, 3)
    np.testing.assert_allclose(found, tx.rollout(model, u, 3), rtol=1e-12)
    stated = operator.state
    assert stated["module"].startswith("trainax_pk") and stated["class"] == "Operator"
    assert json.loads(json.dumps(stated["config"])) == operator.get_config()


def test_other_weights_are_noticed(trained, tmp_path):
    folder, *_ = trained
    for name in (experiment.ARTIFACT, "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = tmp_path / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(experiment.ArtifactDamaged, match="SHA-256"):
        experiment.load_operator(tmp_path)
    weights.write_bytes(bytes(content[:20]))
    with pytest.raises(experiment.ArtifactDamaged, match="Expected safetensors"):
        experiment.load_operator(tmp_path)
    weights.unlink()
    with pytest.raises(experiment.ArtifactDamaged, match="found no such file"):
        experiment.load_operator(tmp_path)
    page = tmp_path / experiment.ARTIFACT
    page.write_text(page.read_text().replace("schema: 1", "schema: 99"))
    with pytest.raises(experiment.RunFileError, match="artifact of schema 1, got 99"):
        experiment.load_operator(tmp_path)


def test_the_command_line(trained, tmp_path, capsys, monkeypatch):
    folder, _, _, _, artifact = trained
    monkeypatch.chdir(tmp_path)
    file = Path("run.yaml")
    file.write_text(TEXT)
    assert main(["validate", "run.yaml"]) == 0
    assert main(["show", "run.yaml", "seed=3"]) == 0
    shown = capsys.readouterr().out.partition("\n")[2]
    assert experiment.read_run(shown).seed == 3
    assert main(["run", "run.yaml"]) == 0
    out = capsys.readouterr().out
    assert "12 updates" in out and "test_nrmse_one_step" in out
    own = experiment.read_artifact(tmp_path / "runs" / "run")
    assert own["weights"]["sha256"] == artifact["weights"]["sha256"]
    assert main(["reproduce", str(folder), "optimizer.b1=0.7"]) == 1
    assert "pipeline.optimizer.b1: recorded 0.9, now 0.7" in capsys.readouterr().out
    assert main(["run", "run.yaml", "--run-dir", str(folder), "seed=1"]) == 2
    assert "got changes" in capsys.readouterr().err
    assert main(["run", "run.yaml", "training.batch_size=999"]) == 2
    assert "batch_size" in capsys.readouterr().err
    assert main(["validate", "run.yaml", "--module", "no_such_module"]) == 2
    assert main(["validate", "nowhere.yaml"]) == 2
    capsys.readouterr()
    assert main(["schema"]) == 0
    assert "$defs" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("place", "message"),
    [("", "path of a folder, got ''"), ("run[1]", "without the signs"),
     ("file", "is a file")],
)  # fmt: skip
def test_places_that_cannot_hold_a_run_are_refused(
    place, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text(TEXT)
    run = experiment.read_run(TEXT)
    # Before anything is made, on disk or else.
    monkeypatch.setattr(_artifact, "build", None)
    with pytest.raises(ValueError, match=message):
        experiment.train(run, place)
    with pytest.raises(ValueError, match=message):
        experiment.sweep(experiment.HyperSweep(run=run, fields={"seed": [0]}), place)
    assert main(["run", "file", "--run-dir", place]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["file"]


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "run.yaml").write_text(TEXT)
    for error in (PermissionError(13, "Permission denied", "there"),
                  tx.checkpoint.SaveFailed("the disk is full", 3)):  # fmt: skip

        def refused(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(experiment, "train", refused)
        assert main(["run", str(tmp_path / "run.yaml")]) == 2
        assert capsys.readouterr().err == f"{error}\n"


def test_a_folder_that_is_removed_while_it_trains_ends_whole(trained, tmp_path):
    _, _, model, history, _ = trained
    built = experiment.build(experiment.read_run(TEXT))

    class Removes(type(built)):
        def train(self, folder):
            shutil.rmtree(folder)
            folder.mkdir()
            return model, history

    folder = tmp_path / "run"
    experiment.train(Removes(*built), folder)
    assert experiment.read_run(folder / experiment.RUN) == built.run
    assert (folder / experiment.ARTIFACT).is_file()


def test_a_folder_of_another_run_stays_without_a_file(tmp_path):
    built = experiment.build(experiment.read_run(TEXT))

    class Other(type(built)):
        def train(self, folder):
            raise tx.checkpoint.RunChanged("another", ["seed"])

    with pytest.raises(tx.checkpoint.RunChanged):
        experiment.train(Other(*built), tmp_path)
    assert not os.listdir(tmp_path)


def test_precision_is_asked_for(trained):
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(ValueError, match="64-bit mode to fit precision float64"):
        experiment.load_operator(trained[0])
    jax.config.update("jax_enable_x64", True)
    narrow = experiment.read_run(TEXT, ["precision=float32"])
    with pytest.raises(ValueError, match="64-bit mode to fit precision float32"):
        experiment.build(narrow)


FEW = ["training.num_steps=4", "training.num_epochs=null", "callbacks=[]"]
SYSTEM = ["data.num_samples=10", "data.temporal_horizon=13", "model.hidden_channels=2"]
FOLDER = Path(os.environ.get("TRAINAX_PK_DATA", ROOT.parent / "shared" / "data"))
ERA5 = FOLDER / "era5_t2m_uk_2019_03.nc"
# How each example is made small, and a constant of its data to be changed.
EXAMPLES = {
    "advection": (SYSTEM, "cfl", 0.7),
    "kuramoto_sivashinsky": (SYSTEM, "domain_extent", 35.0),
    "lorenz_posterior": (
        ["data.num_samples=400", "model.num_features=3", "model.width=4"],
        "dt", 0.011,
    ),
    "lorenz_4dvarnet": (
        ["data.system.num_samples=20", "data.system.temporal_horizon=8",
         "model.hidden_dim=2", "model.num_steps=2"],
        "system.rho", 27.0,
    ),
    "era5_temperature": (
        [f"data.path={ERA5}", "data.coarsen=8", "model.hidden_channels=2",
         "model.depth=1", "data.split=[0.92, 0.04, 0.04]"],
        "coarsen", 7,
    ),
    "downscaling": (
        ["data.system.num_samples=10", "data.system.num_points=16",
         "data.system.temporal_horizon=3", "data.system.num_warmup_steps=2",
         "data.system.num_substeps=8", "model.hidden_channels=2", "data.factor=2",
         "model.num_levels=2"],
        "system.diffusivity", 0.02,
    ),
}  # fmt: skip


def test_every_example_is_trained():
    assert set(EXAMPLES) == {p.stem for p in (ROOT / "examples").glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_train_and_are_reproduced_at_a_small_size(name, tmp_path):
    if name == "era5_temperature" and not ERA5.is_file():
        pytest.skip(f"{ERA5} is not there")
    size, constant, value = EXAMPLES[name]
    fields = [*size, *FEW, "precision=float64"]
    run = experiment.read_run(ROOT / "examples" / f"{name}.yaml", fields)
    _, history, artifact = experiment.train(run, tmp_path)
    assert history.loss.shape == (4,) and bool(jnp.all(jnp.isfinite(history.loss)))
    assert all(np.isfinite(list(artifact["results"].values())))
    same = experiment.reproduce(tmp_path)
    assert same.is_identical and not same.differences
    operator = experiment.load_operator(tmp_path)
    assert operator.get_config() == run.to_data()

    rate = run.to_data()["optimizer"]["learning_rate"]
    place = "learning_rate.peak" if isinstance(rate, dict) else "learning_rate"
    again = experiment.read_run(
        yaml.safe_dump(run.to_data()),
        [f"data.{constant}={value}", f"optimizer.{place}=0.0123"],
    )
    found = experiment.reproduce(tmp_path, again)
    assert found.differences[f"dataset.{constant}"][1] == value
    assert found.differences[f"pipeline.optimizer.{place}"][1] == 0.0123
    parts = {"dataset", f"dataset.{constant}", f"pipeline.optimizer.{place}"}
    assert set(found.differences) - parts <= {"weights", "losses"}
    assert not found.is_identical


@pytest.mark.slow
def test_modules_of_the_user_register_kinds(tmp_path):
    (tmp_path / "my_models.py").write_text(
        """
from typing import Literal
import equinox as eqx
from trainax_pk.experiment import AbstractSpec, register

@register("model")
class Stencil(AbstractSpec):
    kind: Literal["stencil"] = "stencil"
    taps: int = 3

    def build(self, shape, key):
        return eqx.nn.Conv1d(1, 1, self.taps, padding="SAME", key=key)
"""
    )
    (tmp_path / "run.yaml").write_text(
        TEXT.replace(
            "kind: conv, hidden_channels: 2, depth: 1", "kind: stencil, taps: 5"
        )
    )
    command = [sys.executable, "-m", "trainax_pk", "show", "run.yaml"]
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    without = subprocess.run(command, env=environment, **options)
    assert without.returncode == 2 and "run.yaml:3: model.kind" in without.stderr
    with_it = subprocess.run(
        [*command, "--module", "my_models"], env=environment, **options
    )
    assert with_it.returncode == 0 and "taps: 5" in with_it.stdout


def test_a_run_is_resumed_from_its_folder_alone(tmp_path, capsys, monkeypatch):
    run = experiment.read_run(TEXT)
    whole, _, _ = experiment.train(run, tmp_path / "whole")
    segment = tx.checkpoint.Segment(epochs=1.5)
    built, folder = experiment.build(run), tmp_path / "cut"
    with monkeypatch.context() as patch:
        # As a signal would: it stops, saved, before there is an artifact.
        patch.setattr(
            experiment.Built, "train",
            lambda self, f: (_ for _ in ()).throw(SystemExit(143))
            if self.trainer(self.model, key=self.key, run_dir=f, segment=segment) else 0,
        )  # fmt: skip
        with pytest.raises(SystemExit):
            experiment.train(built, folder)
    assert not (folder / experiment.ARTIFACT).exists()
    assert main(["resume", str(folder)]) == 0
    assert "12 updates" in capsys.readouterr().out
    again = experiment.load_operator(folder).model
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        assert not isinstance(a, jax.Array) or np.array_equal(a, b)
    assert main(["resume", str(tmp_path)]) == 2
    assert "expected a file, found none" in capsys.readouterr().err


@pytest.mark.slow
def test_a_report_is_one_page(trained, tmp_path, capsys):
    folder, *_, artifact = trained
    assert main(["report", str(folder)]) == 0
    path = Path(capsys.readouterr().out.strip())
    page = path.read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 3
    # Nothing is fetched: no address, no script, no style sheet or frame from elsewhere.
    for outside in ("http", "//", "<script", "<link", "<iframe", "url(", "@import"):
        assert outside not in re.sub(r"base64,[^\"]+", "", page), outside
    for word in ("Adjoints", "checkpointed", "cfl: 0.75", artifact["weights"]["sha256"],
                 artifact["versions"]["jax"], "test nrmse one step"):  # fmt: skip
        assert word in page
    pictures = re.findall(r'base64,([^"]+)"', page)
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert main(["report", str(tmp_path)]) == 2
    assert "expected a file, found none" in capsys.readouterr().err


@pytest.mark.slow
def test_adjoints_are_measured(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    assert main(["bench", "adjoints", str(file)]) == 0
    out = capsys.readouterr().out
    assert "checkpointed" in out and "Relative to direct" in out
    inner = "{kind: input_noise, std: 0.1, configuration: supervised}"
    file.write_text(TEXT.replace("{kind: supervised, num_rollout_steps: 2}", inner))
    assert main(["bench", "adjoints", str(file)]) == 2
    assert "a model with an adjoint" in capsys.readouterr().err


def test_a_registry(trained, tmp_path):
    folder, _, model, _, artifact = trained
    registry = experiment.Registry(tmp_path / "registry")
    assert registry.digests() == [] and registry.tags() == {}
    digest = registry.store(folder, tags=["best", "v1.0"])
    assert registry.store(folder / experiment.ARTIFACT) == digest
    assert registry.digests() == [digest] and registry.tags() == dict.fromkeys(
        ("best", "v1.0"), digest
    )
    u = jnp.sin(jnp.arange(12.0))[None]
    np.testing.assert_array_equal(registry.load("best")(u), model(u))
    assert experiment.read_artifact(registry.resolve(digest[:6])) == artifact
    registry.tag("best", "newest")
    assert registry.resolve("newest") == registry.resolve(digest)
    for name in ("other", digest[:5], "f" * 64):
        with pytest.raises(KeyError, match="Expected a tag or the beginning of one"):
            registry.resolve(name)
    for tag in ("../up", "", ".hidden", "a b"):
        with pytest.raises(ValueError, match="Expected a tag of letters"):
            registry.tag("best", tag)
    weights = registry.resolve("best") / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(experiment.ArtifactDamaged, match="SHA-256"):
        registry.load("best")


def test_preprocessing_travels_with_the_model(trained, tmp_path):
    folder, _, model, *_ = trained
    for name in (experiment.ARTIFACT, "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    page = tmp_path / experiment.ARTIFACT
    found = page.read_text().replace(
        "preprocessing: null", "preprocessing: {mean: 3.0, std: 2.0}"
    )
    page.write_text(found)
    operator = experiment.load_operator(tmp_path)
    u = jnp.sin(jnp.arange(12.0))[None]
    np.testing.assert_allclose(operator(2 * u + 3), 2 * model(u) + 3, rtol=1e-12)
    both = experiment.Sequential(operator, experiment.Standardise(3.0, 2.0))
    np.testing.assert_allclose(both(2 * u + 3), model(u), rtol=1e-12)
    kinds = [c["class"] for c in both.get_config()["operators"]]
    assert kinds == ["Operator", "Standardise"] and both.state["class"] == "Sequential"
    with pytest.raises(ValueError, match="Expected operators, got \\(\\)"):
        experiment.Sequential()


def test_the_demo_is_called(tmp_path, monkeypatch):
    # What it does, test_demo.py tells.
    called = []
    monkeypatch.setattr("trainax_pk.demo.__main__.main", called.append)
    assert main(["demo", "--small", "--output", str(tmp_path)]) == 0
    assert called == [["--output", str(tmp_path), "--small"]]
