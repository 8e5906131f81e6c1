"""Trackers see every line, and cannot touch a run."""

import struct
import threading
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

import trainax_pk as tx
from trainax_pk import _extras
from trainax_pk.checkpoint import read_metrics
from trainax_pk.tracker import (
    AbstractTracker,
    MLflow,
    TensorBoard,
    WeightsAndBiases,
    _queue,
)
from trainax_pk.tracker._queue import Tracking

DATA = jax.random.normal(jax.random.key(0), (4, 9, 3))


class Recorder(AbstractTracker):
    """Keeps what it is told; may fail or hang."""

    def __init__(self, *, hang=None, fail=False):
        self.lines = []
        self.opened = self.closed = 0
        self._hang, self._fail = hang, fail

    def open(self, run_dir):
        self.opened += 1

    def log(self, step, values):
        if self._hang is not None:
            self._hang.wait()
        if self._fail:
            raise ConnectionError("no route")
        self.lines.append({"step": step, **values})

    def close(self):
        self.closed += 1


def train(folder, trackers):
    callback = tx.callback.Function(
        lambda step, model, batch: {"a": jnp.array([step, 0.5])}, 10, "own"
    )
    trainer = tx.trainer.SupervisedTrainer(
        DATA,
        optimizer=optax.adam(1e-2),
        num_training_steps=30,
        batch_size=10,
        callbacks=[callback],
        log_every=5,
        trackers=trackers,
        progress=False,
    )
    model = eqx.nn.Linear(3, 3, key=jax.random.key(1))
    return trainer(model, key=jax.random.key(5), run_dir=folder)[1].loss


def test_every_line_is_passed_on_in_order(tmp_path):
    one, other = Recorder(), Recorder()
    train(tmp_path, [one, other])
    lines = [
        {k: x for k, x in line.items() if k != "callback"}
        for line in read_metrics(tmp_path / "metrics.jsonl")
    ]
    assert len(lines) == 10 and one.lines == other.lines == lines
    assert one.opened == one.closed == 1


def test_one_that_fails_is_left_alone(tmp_path):
    failing, other = Recorder(fail=True), Recorder()
    with pytest.warns(
        RuntimeWarning, match="Recorder failed .ConnectionError: no route"
    ):
        loss = train(tmp_path / "a", [failing, other])
    assert len(other.lines) == 10 and not failing.closed
    assert np.array_equal(loss, train(tmp_path / "b", []))


def test_one_that_hangs_holds_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setattr(_queue, "_PATIENCE", 0.1)
    monkeypatch.setattr(_queue, "_LENGTH", 4)
    over = threading.Event()
    hanging = Recorder(hang=over)
    tracking = Tracking([hanging])
    tracking.open(tmp_path)
    began = time.monotonic()
    for step in range(100):
        tracking.log(step, {"loss": 1.0})
    with pytest.warns(RuntimeWarning, match="had not ended"):
        tracking.close()
    assert time.monotonic() - began < 5 and tracking.num_dropped > 90
    over.set()


def read_events(folder):
    """Scalars of event files: length, its checksum, an event, its checksum."""
    scalars = {}
    for path in sorted(Path(folder).iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                scalars[(value.tag, event.step)] = value.simple_value
    return scalars


def test_several_that_hang_cost_no_more_than_one(tmp_path, monkeypatch):
    monkeypatch.setattr(_queue, "_PATIENCE", 1.0)
    hang = threading.Event()
    tracking = Tracking([Recorder(hang=hang) for _ in range(4)])
    tracking.open(tmp_path)
    tracking.log(1, {})
    began = time.monotonic()
    with pytest.warns(RuntimeWarning, match="had not ended"):
        tracking.close()
    assert time.monotonic() - began < 2.0
    hang.set()


def test_one_that_exits_ends_alone(tmp_path):
    class Exits(Recorder):
        def log(self, step, values):
            raise SystemExit(1)

    with pytest.warns(RuntimeWarning, match="SystemExit"):
        train(tmp_path, [Exits()])


def test_tensorboard_reads_what_is_written(tmp_path):
    train(tmp_path, [TensorBoard()])
    scalars = read_events(tmp_path / "tensorboard")
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        if "loss" in line:
            found = scalars["loss", line["step"]]
            np.testing.assert_allclose(found, line["loss"], rtol=1e-6)
    assert scalars["own/a/0", 20] == 20 and scalars["own/a/1", 20] == 0.5
    assert len(scalars) == 6 * 2 + 4 * 2


def test_mlflow_holds_what_is_written(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setattr(_queue, "_PATIENCE", 120.0)  # A busy machine is no failure.
    for _ in range(2):  # The second call finds a finished run, and the same one there.
        train(tmp_path, [MLflow("some experiment")])
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("some experiment")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    lines = [x for x in read_metrics(tmp_path / "metrics.jsonl") if "loss" in x]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [
        (x["step"], x["loss"]) for x in lines
    ]
    assert client.get_metric_history(run.info.run_id, "own/a/1")[0].value == 0.5


def test_weights_and_biases_holds_what_is_written_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(_queue, "_PATIENCE", 120.0)
    train(tmp_path, [WeightsAndBiases("some-project", mode="offline")])
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (stored,) = folder.glob("run-*.wandb")
    assert (tmp_path / "wandb.txt").read_text() in stored.name
    content = stored.read_bytes()
    assert b"some-project" in content and b"grad_norm" in content
    last = [x for x in read_metrics(tmp_path / "metrics.jsonl") if "loss" in x][-1]
    assert str(last["loss"]).encode() in content


@pytest.mark.parametrize("tracker", [MLflow(), WeightsAndBiases(mode="offline")])
def test_a_backend_that_is_not_installed_is_named(tracker, tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(_extras.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"trainax_pk\[(mlflow|wandb)\]"):
        tracker.open(tmp_path)


def test_what_is_no_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tx.tracker.TensorBoard"):
        train(tmp_path, [print])
