"""Sweeps: which trials there are, what trains together, ranks, pruning, resumption."""

import functools
import json
import math
import os
import shutil
import signal
import sys
import threading
import types
from typing import Literal

import equinox as eqx
import jax
import numpy as np
import pytest
import yaml

from trainax_pk import experiment
from trainax_pk.__main__ import command, main
from trainax_pk.experiment import _members, _numbers, _spec, _sweep
from trainax_pk.experiment._numbers import can_be_mapped, group_alike
from trainax_pk.experiment._run import build_with, make_data
from trainax_pk.experiment._sampler import Uniform
from trainax_pk.experiment._saved import read_arrays

TEXT = """\
precision: float64
data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 8, num_warmup_steps: 5}
model: {kind: mlp, width: 4, depth: 1}
configuration: {kind: supervised, num_rollout_steps: 2, time_level_weights: [1.0, 0.5]}
optimizer: {kind: adam, learning_rate: 1e-2}
training: {num_steps: 12, batch_size: 8, log_every: 4, program: scan}
"""
RATE = "optimizer.learning_rate"
# Programs split over the four devices of the tests take thrice as long to compile.
sweep = functools.partial(experiment.sweep, num_devices=1)


def make(fields, text=TEXT, **rest):
    described = {"run": experiment.read_run(text).to_data(), "fields": fields, **rest}
    return experiment.read_sweep(json.dumps(described))


def weights(folder, trial):
    return experiment.load_operator(folder / f"trials/{trial:04d}").model.net


def losses(folder, trial):
    lines = (folder / f"trials/{trial:04d}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


FIELDS = {RATE: [1e-3, 1e-2], "configuration.time_level_weights.1": [0.1, 0.9],
          "seed": [0, 3]}  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    text = (
        TEXT + "callbacks: [{kind: validation, every: 5}, {kind: grad_norm, every: 6}]"
    )
    return folder, make(FIELDS, text), sweep(make(FIELDS, text), folder)


def test_trials_that_train_together_are_those_one_by_one(together, tmp_path):
    folder, spec, ranked = together
    assert len(ranked) == 8 and (folder / "groups").is_dir()
    assert not list((folder / "groups").iterdir())
    for trial in (0, 3, 6):
        run = spec.trials([])[trial].run
        model, history, _ = experiment.train(run, tmp_path / str(trial))
        own = weights(folder, trial)
        for a, b in zip(own.layers, model.net.layers, strict=True):
            np.testing.assert_allclose(a.weight, b.weight, rtol=1e-6, atol=1e-9)
        lines = losses(folder, trial)
        path = tmp_path / str(trial) / "metrics.jsonl"
        alone = [json.loads(line) for line in path.read_text().splitlines()]
        kinds = lambda ls: sorted((x["step"], x.get("callback", "")) for x in ls)  # noqa: E731
        assert kinds(lines) == kinds(alone)
        last = [x["validation"] for x in lines if "validation" in x]
        expected = [x["validation"] for x in alone if "validation" in x]
        np.testing.assert_allclose(last, expected, rtol=1e-6)
        value = next(r.value for r in ranked if r.trial == trial)
        np.testing.assert_allclose(value, expected[-1], rtol=1e-6)


def test_ranks_and_artifacts(together):
    folder, spec, ranked = together
    values = [r.value for r in ranked]
    assert values == sorted(values) and {r.status for r in ranked} == {"done"}
    page = yaml.safe_load((folder / experiment.RANKING).read_text())
    assert [p["trial"] for p in page] == [r.trial for r in ranked]
    for r in ranked:
        artifact = experiment.read_artifact(folder / r.folder)
        run = spec.trials([])[r.trial].run
        assert artifact["run"] == run.to_data() and artifact["num_updates"] == 12


def test_a_sweep_that_ended_is_not_trained_again(together, monkeypatch):
    folder, spec, ranked = together
    monkeypatch.setattr(_members.Members, "__init__", None)
    assert sweep(spec, folder) == ranked
    with pytest.raises(ValueError, match="holds another \\(fields run, fields\\)"):
        sweep(make({"seed": [0]}), folder)


class Killed(BaseException):
    """Stands for a signal that nothing catches."""


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path, monkeypatch):
    fields = {RATE: {"kind": "log_uniform", "low": 1e-4, "high": 1e-1, "num": 4}}
    spec = make(fields, TEXT.replace("num_steps: 12", "num_steps: 100"),
                pruning={"at": [0.25, 0.5], "keep": 0.5})  # fmt: skip
    whole = sweep(spec, tmp_path / "whole")
    assert [r.status for r in whole] == ["done", "pruned", "pruned", "pruned"]
    assert [r.num_updates for r in whole] == [100, 50, 25, 25]
    original, calls = _members.Members.save, []

    def save(self):
        original(self)
        calls.append(self.done)
        if len(calls) in (1, 3, 4):
            raise Killed

    monkeypatch.setattr(_members.Members, "save", save)
    for _ in range(3):
        with pytest.raises(Killed):
            sweep(spec, tmp_path / "cut")
    again = sweep(spec, tmp_path / "cut")
    assert again == whole
    best = whole[0].trial
    for a, b in zip(weights(tmp_path / "cut", best).layers,
                    weights(tmp_path / "whole", best).layers, strict=True):  # fmt: skip
        np.testing.assert_allclose(a.weight, b.weight, rtol=1e-9)


@pytest.mark.slow
def test_a_killed_sweep_of_trials_that_train_alone_goes_on(tmp_path, monkeypatch):
    spec = make({RATE: [1e-3, 1e-2]}, together=False)
    whole = sweep(spec, tmp_path / "whole")
    original, calls = _sweep._Alone.advance, []

    def advance(self, stop, **options):
        calls.append(self.trials[0].number)
        if len(calls) == 2:
            raise Killed
        return original(self, stop, **options)

    monkeypatch.setattr(_sweep._Alone, "advance", advance)
    with pytest.raises(Killed):
        sweep(spec, tmp_path / "cut")
    # Those that ended have left all that they leave.
    assert experiment.load_operator(tmp_path / "cut/trials/0000").model is not None
    assert sweep(spec, tmp_path / "cut") == whole
    for trial in range(2):
        a, b = (
            experiment.read_artifact(tmp_path / f"{name}/trials/{trial:04d}")
            for name in ("cut", "whole")
        )
        assert a["weights"] == b["weights"] and a["losses_sha256"] == b["losses_sha256"]


def test_trials_that_ended_before_a_kill_are_not_trained_again(
    tmp_path, monkeypatch, together
):
    folder, spec, _ = together
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    # As if it had been killed while it wrote these two.
    for trial in (3, 6):
        (tmp_path / f"trials/{trial:04d}/trial.yaml").unlink()
    asked = []

    def groups(spec, trials, *rest):
        asked.extend(t.number for t in trials)
        raise Killed

    monkeypatch.setattr(_sweep, "_groups", groups)
    with pytest.raises(Killed):
        sweep(spec, tmp_path)
    assert asked == [3, 6]


def test_one_that_is_not_finite_when_it_is_repeated_has_failed(tmp_path, monkeypatch):
    def advance(self, stop, **options):
        return {0: math.nan}

    # Killed before its artifact was written; it was finite then.
    (tmp_path / "values.yaml").write_text("'0000': [1.0]")
    monkeypatch.setattr(_sweep._Alone, "advance", advance)
    for _ in range(2):
        (failed,) = sweep(make({"seed": [0]}), tmp_path)
        assert failed.status == "failed" and math.isnan(failed.value)
        assert failed.num_updates == 12 and failed.folder is None


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)],
)
def test_a_signal_ends_a_sweep_saved(tmp_path, monkeypatch, together, number, error):
    _, spec, ranked = together
    original, done = _members.Members._chunk_of, []

    def chunk_of(self, count, size):
        original(self, count, size)
        done.append(self.done)
        if len(done) == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(_members.Members, "_chunk_of", chunk_of)
    with pytest.raises(error):
        sweep(spec, tmp_path)
    (stopped,) = done
    assert stopped < 12 and list((tmp_path / "groups").iterdir())
    again = sweep(spec, tmp_path)
    assert done[1] > stopped and done[-1] == 12
    assert [r.trial for r in again] == [r.trial for r in ranked]
    np.testing.assert_allclose(
        [r.value for r in again], [r.value for r in ranked], rtol=1e-9
    )


def test_an_interrupted_command_says_so_and_nothing_else(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainax_pk.__main__.main", interrupted)
    with pytest.raises(SystemExit) as found:
        command()
    assert found.value.code == 130 and capsys.readouterr().err == "interrupted\n"


CONV = TEXT.replace(
    "{kind: mlp, width: 4, depth: 1}", "{kind: conv, hidden_channels: 2, depth: 1}"
).replace(
    TEXT.splitlines()[1],
    "data: {kind: advection_1d, num_points: 12, num_samples: 10, temporal_horizon: 5}",
)


@pytest.mark.parametrize(
    "text", [pytest.param(TEXT, marks=pytest.mark.slow), CONV], ids=["mlp", "conv"]
)
def test_one_that_fails_takes_none_with_it(tmp_path, text):
    text = text.replace("adam", "sgd")
    ranked = sweep(make({RATE: [1e-3, 1e30, 1e-2]}, text), tmp_path)
    assert [r.status for r in ranked] == ["done", "done", "failed"]
    assert ranked[-1].trial == 1 and math.isnan(ranked[-1].value)
    alone = sweep(make({RATE: [1e-3, 1e-2]}, text, together=False), tmp_path / "alone")
    np.testing.assert_allclose(
        [r.value for r in ranked[:2]], [r.value for r in alone], rtol=1e-6
    )


def test_what_can_train_together():
    spec = make({RATE: [1e-3, 2], "model.width": [4, 8], "seed": [0, 1]})
    groups = list(group_alike(spec.trials([])).values())
    assert [len(g) for g in groups] == [4, 4]
    kinds = {
        RATE: [1e-3, {"kind": "cosine", "peak": 0.1}],
        "optimizer.clip_norm": [None, 1.0],
    }
    assert len(group_alike(make(kinds).trials([]))) == 4


def test_two_devices_train_what_one_does(tmp_path, together, monkeypatch):
    folder, _, ranked = together
    save, seen = _members.Members.save, set()

    def spy(self):
        leaf = jax.tree.leaves(self._state.params)[0]
        seen.add(len(leaf.sharding.device_set))
        save(self)

    monkeypatch.setattr(_members.Members, "save", spy)
    few = FIELDS | {"seed": [3], "configuration.time_level_weights.1": [0.9]}
    # One by one: programs of fewer updates take less to compile.
    text = TEXT.replace("scan", "loop")
    shared = experiment.sweep(make(few, text), tmp_path, num_devices=2)
    assert len(shared) == 2 and seen == {2}
    for found in shared:
        (same,) = (r for r in ranked if r.fields == found.fields)
        np.testing.assert_allclose(found.value, same.value, rtol=1e-9)
        ours, theirs = weights(tmp_path, found.trial), weights(folder, same.trial)
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            np.testing.assert_allclose(a.weight, b.weight, rtol=1e-9)


@pytest.mark.slow
def test_devices_share_the_trials_that_train_together(tmp_path, monkeypatch):
    seen, save = [], _members.Members.save

    def spy(self):
        leaf = jax.tree.leaves(self._state.params)[0]
        seen.append((len(self.trials), len(leaf.sharding.device_set)))
        save(self)

    monkeypatch.setattr(_members.Members, "save", spy)
    fields = {RATE: [1e-4, 1e-3, 1e-2, 3e-2], "seed": [0, 3]}
    spec = make(fields, pruning={"at": [0.5], "keep": 0.75})
    one = experiment.sweep(spec, tmp_path / "one", num_devices=1)
    assert set(seen) == {(8, 1), (6, 1)}
    seen.clear()
    shared = experiment.sweep(spec, tmp_path / "shared")
    # Of four devices three divide the trials that are left.
    assert list(dict.fromkeys(seen)) == [(8, 4), (6, 3)]
    for a, b in zip(one, shared, strict=True):
        assert (a.trial, a.status) == (b.trial, b.status)
        np.testing.assert_allclose(a.value, b.value, rtol=1e-9)
    best = one[0].trial
    for a, b in zip(
        weights(tmp_path / "one", best).layers,
        weights(tmp_path / "shared", best).layers,
        strict=True,
    ):
        np.testing.assert_allclose(a.weight, b.weight, rtol=1e-9)

    def killed(self):
        spy(self)
        raise Killed

    seen.clear()
    monkeypatch.setattr(_members.Members, "save", killed)
    with pytest.raises(Killed):
        experiment.sweep(spec, tmp_path / "cut")
    monkeypatch.setattr(_members.Members, "save", spy)
    moved = experiment.sweep(spec, tmp_path / "cut", num_devices=1)
    assert list(dict.fromkeys(seen)) == [(8, 4), (8, 1), (6, 1)]
    for a, b in zip(one, moved, strict=True):
        assert a._replace(value=0.0) == b._replace(value=0.0)
        np.testing.assert_allclose(a.value, b.value, rtol=1e-9)
    for a, b in zip(
        losses(tmp_path / "one", best), losses(tmp_path / "cut", best), strict=True
    ):
        assert a["step"] == b["step"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-9)
    with pytest.raises(ValueError, match="at most 4, as there are, got 5"):
        experiment.sweep(spec, tmp_path / "more", num_devices=5)


def test_trials_with_trackers_train_alone(tmp_path):
    fields, text = {RATE: [1e-3, 1e-2]}, TEXT + "trackers: [{kind: tensorboard}]"
    tracked = sweep(make(fields, text), tmp_path / "tracked")
    assert not (tmp_path / "tracked/groups").exists()
    for trial in range(2):
        (events,) = (tmp_path / f"tracked/trials/{trial:04d}/tensorboard").iterdir()
        assert b"grad_norm" in events.read_bytes()
    plain = sweep(make(fields, TEXT, together=False), tmp_path / "plain")
    assert tracked == plain


def test_a_tracker_that_is_not_installed_is_refused_before_compute(
    tmp_path, monkeypatch, capsys
):
    cls = experiment.kinds_of("tracker")["wandb"]
    monkeypatch.setattr(cls, "package", ("no_such_package", "wandb"))
    file = tmp_path / "run.yaml"
    file.write_text(TEXT + "trackers: [wandb]")
    assert main(["run", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    assert "trainax_pk[wandb]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    spec = make({"seed": [0, 1]}, TEXT + "trackers: [wandb]")
    with pytest.raises(ImportError, match=r"trainax_pk\[wandb\]"):
        sweep(spec, tmp_path / "sweep")
    # Only what trains needs it: a run is built, and reported on, without.
    built = experiment.build(spec.run)
    with pytest.raises(ImportError, match=r"trainax_pk\[wandb\]"):
        built.train()
    # One that was put there by hand.
    monkeypatch.setitem(sys.modules, "no_such_package", types.ModuleType("by_hand"))
    assert cls().check() is None
    # Kinds of the user's need not say what they import.
    assert _tracker_of_ones_own().check() is None


def _tracker_of_ones_own():
    from_here = type("Own", (type(experiment.kinds_of("tracker")["wandb"]()).__mro__[1],),
                     {"build": lambda self: None})  # fmt: skip
    return from_here()


def test_trials_that_ended_are_ranked_by_value_whatever_their_length():
    ranked = functools.partial(_sweep.Ranked, fields={}, folder=None)
    short = ranked(0, value=0.1, status="done", num_updates=10)
    long = ranked(1, value=0.2, status="done", num_updates=1000)
    early = ranked(2, value=0.01, status="pruned", num_updates=10)
    late = ranked(3, value=0.05, status="pruned", num_updates=20)
    failed = ranked(4, value=math.nan, status="failed", num_updates=500)
    found = sorted([failed, early, long, late, short], key=_sweep._order)
    assert found == [short, long, late, early, failed]


def test_a_trial_that_was_stopped_early_says_so(tmp_path):
    stop = "early_stopping: {monitor: validation, patience: 1, min_delta: 1e9}"
    text = TEXT + "callbacks: [{kind: validation, every: 3}]\n" + stop
    (ranked,) = sweep(make({"seed": [0]}, text), tmp_path)
    artifact = experiment.read_artifact(tmp_path / ranked.folder)
    assert ranked.num_updates == artifact["num_updates"] < 12


class Seeded(experiment.AbstractSpec):
    """Draws its weights by a number, as Keras does."""

    kind: Literal["seeded"] = "seeded"

    def build(self, shape, key):
        rng = np.random.default_rng(int(jax.random.bits(key, dtype="uint32")))
        net = eqx.nn.Linear(shape[0], shape[0], key=jax.random.key(0))
        return eqx.tree_at(lambda m: m.weight, net, jax.numpy.asarray(
            rng.normal(size=(shape[0], shape[0]))))  # fmt: skip


def test_a_model_whose_weights_cannot_be_mapped_is_noticed(monkeypatch):
    monkeypatch.setitem(_spec._KINDS["model"], "seeded", Seeded)
    text = TEXT.replace("{kind: mlp, width: 4, depth: 1}", "seeded")
    trial = make({RATE: [1e-3, 1e-2]}, text).trials([])[0]
    made = make_data(trial.run)
    assert not can_be_mapped(trial, made, build_with(trial.run, made))


def test_whether_models_can_be_mapped_is_asked_without_making_them(monkeypatch):
    trial = make({RATE: [1e-3, 1e-2]}).trials([])[0]
    made = make_data(trial.run)
    built = build_with(trial.run, made)

    def makes(run, key):
        data = jax.random.key_data(key)
        form = jax.ShapeDtypeStruct(data.shape, data.dtype)
        return jax.pure_callback(lambda x: 1 / 0, form, data, vmap_method="sequential")

    def reads_constants(run, key):
        return float(jax.numpy.sqrt(4.0)) * jax.random.normal(key, (2,))

    for function in (makes, reads_constants):
        monkeypatch.setattr(_numbers, "make_model", function)
        assert can_be_mapped(trial, made, built)


def test_a_save_from_another_thread_is_of_one_update(tmp_path):
    members = object.__new__(_members.Members)
    states = [({"w": np.full(2, n)}, {"loss": np.zeros((1, n))}) for n in (2, 5)]
    members.trials, members.failed, members.done = [], {}, 2
    members._seconds, members._program, members._records = 0.0, "", []
    members._state, members._series = states[0][0], [states[0][1]]
    members._file, members._raises = tmp_path / "file", False
    members._whole = threading.Lock()
    members._engine = types.SimpleNamespace(describe=lambda: "")
    members._run = lambda *_: (states[1][0], {"loss": np.zeros((1, 3))})
    parts, begun, ended = members._parts, threading.Event(), threading.Event()

    def slowly():
        begun.set()
        ended.wait(0.2)
        return parts()

    members._parts = slowly
    saver = threading.Thread(target=members.save)
    saver.start()
    begun.wait()
    members._chunk_of(3, 1)
    ended.set()
    saver.join()
    found = read_arrays(members._file)
    assert members.done == 5 and json.loads(found.note)["done"] == 2
    assert found.arrays["['state']['w']"][0] == 2
    assert found.arrays["['series']['loss']"].shape == (1, 2)


@pytest.mark.parametrize(
    ("field", "optimizer", "mapped"),
    [
        ("optimizer.b1", "{kind: adam, learning_rate: 1e-3}", True),
        ("optimizer.weight_decay", "{kind: adamw, learning_rate: 1e-3}", True),
        ("optimizer.clip_norm", "{kind: sgd, learning_rate: 1e-3, clip_norm: 1.0}", True),
        ("optimizer.learning_rate.peak",
         "{kind: adam, learning_rate: {kind: cosine, peak: 1e-3, warmup: 2}}", True),
        ("optimizer.learning_rate.warmup",
         "{kind: adam, learning_rate: {kind: cosine, peak: 1e-3, warmup: 2.0}}", False),
    ],
)  # fmt: skip
def test_numbers_that_fix_a_program_are_noticed(field, optimizer, mapped):
    text = TEXT.replace("{kind: adam, learning_rate: 1e-2}", optimizer)
    trial = make({field: [0.2, 0.3]}, text).trials([])[0]
    made = make_data(trial.run)
    assert can_be_mapped(trial, made, build_with(trial.run, made)) is mapped


def test_samplers():
    fields = {RATE: {"kind": "log_uniform", "low": 1e-4, "high": 1.0},
              "optimizer.b1": {"kind": "uniform", "low": 0.5, "high": 0.9},
              "model.width": {"kind": "integers", "low": 3, "high": 5},
              "seed": [7, 8]}  # fmt: skip
    spec = make(fields, sampler={"kind": "random", "num_trials": 30, "seed": 2})
    trials = spec.trials([])
    assert trials == spec.trials([]) and len(trials) == 30
    assert {t.run.model.width for t in trials} == {3, 4, 5}
    assert {t.run.seed for t in trials} == {7, 8}
    rates = np.log10([t.run.optimizer.learning_rate for t in trials])
    assert -4 <= rates.min() < -3 and -1 < rates.max() <= 0
    assert spec.trials([({}, 0.0)]) == []
    grid = experiment.ParameterGrid({"a": [1, 2], "b": "xyz"})
    assert list(grid)[:4] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"},
                              {"a": 1, "b": "z"}, {"a": 2, "b": "x"}]  # fmt: skip
    with pytest.raises(ValueError, match="Expected values of b"):
        experiment.ParameterGrid({"b": []})
    with pytest.raises(ValueError, match="Expected `num` values of a range"):
        make({RATE: {"kind": "uniform", "low": 0.1, "high": 0.2}}).trials([])
    assert Uniform(low=1.0, high=3.0, num=3).build() == [1.0, 2.0, 3.0]


def test_optuna_goes_towards_the_best():
    pytest.importorskip("optuna")
    fields = {RATE: {"kind": "log_uniform", "low": 1e-6, "high": 1.0},
              "model.activation": ["relu", "tanh"]}  # fmt: skip
    spec = make(fields, sampler={"kind": "optuna", "num_trials": 40, "batch": 8})
    told = []
    while trials := spec.trials(told):
        assert trials == spec.trials(told)  # a killed sweep asks again
        told += [(t.fields, _score(t.fields)) for t in trials]
    assert len(told) == 40
    early, late = (
        [v for _, v in part if not math.isnan(v)] for part in (told[:8], told[-16:])
    )
    assert np.median(late) < np.median(early)


def _score(fields):
    if fields["model.activation"] == "relu" and fields[RATE] > 0.3:
        return math.nan
    return (math.log10(fields[RATE]) + 3) ** 2 + (fields["model.activation"] == "relu")


@pytest.mark.parametrize(
    ("fields", "rest", "message"),
    [
        (
            {"optimizer.rate": [1.0]},
            {},
            "expected fields of the run, got 'optimizer.rate'",
        ),
        ({"seed": []}, {}, "fields.seed.options"),
        ({"seed": 3}, {}, "fields.seed: expected `kind:`"),
        ({"seed": {"kind": "uniform", "low": 2.0, "high": 1.0}}, {}, "low < high"),
        ({}, {}, "fields: "),
        ({"seed": [0]}, {"rank_by": "loss"}, "rank_by: expected"),
        ({"seed": [0]}, {"use_ema": True}, "training.ema_decay with use_ema"),
        ({"seed": [0]}, {"pruning": {"at": [0.5, 0.2]}}, "shares that ascend"),
        ({"seed": [0]}, {"pruning": {"at": [1.0]}}, "pruning.at.0"),
        ({"seed": [0]}, {"sampler": "best"}, "sampler: expected"),
        ({"seed": [0]}, {"prunning": None}, "unknown field. Did you mean 'pruning'"),
    ],
)
def test_bad_sweeps_are_refused(fields, rest, message):
    with pytest.raises(experiment.RunFileError, match=message):
        make(fields, **rest)


def test_values_that_make_no_run_are_refused():
    with pytest.raises(ValueError, match="With {'seed': -1}: seed"):
        make({"seed": [-1]}).trials([])


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(TEXT)
    file = tmp_path / "few.yaml"
    file.write_text(f"run: run.yaml\nfields:\n  {RATE}: [1e-3, 1e-2]\n")
    assert (
        main(["sweep", "few.yaml", "run.training.num_steps=3", "--num-devices", "1"])
        == 0
    )
    out = capsys.readouterr().out
    assert "1. " in out and "2 done" in out and "ranking.yaml" in out
    assert main(["resume", "sweeps/few", "--num-devices", "1"]) == 0
    assert capsys.readouterr().out == out
    assert main(["resume", str(tmp_path), "--num-devices", "1"]) == 2
    assert "expected the folder of a sweep" in capsys.readouterr().err
    assert main(["sweep", "few.yaml"]) == 2
    assert "holds another" in capsys.readouterr().err
    file.write_text(f"run: run.yaml\nfields:\n  {RATE}: [1e-3, -1]\n")
    assert main(["sweep", "few.yaml", "--sweep-dir", "other"]) == 2
    assert "number above 0" in capsys.readouterr().err
