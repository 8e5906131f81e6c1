"""What goes wrong around a run: told as what it is, and never more lost than that."""

import json
import os
import resource
import shutil
import socket
import time
from contextlib import nullcontext

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import trainax_pk as tx
from trainax_pk import _files
from trainax_pk._lock import hold_lock
from trainax_pk.checkpoint import Policy, SaveFailed, Segment, _store, read_metrics
from trainax_pk.checkpoint._log import MetricLog
from trainax_pk.checkpoint._run_base import Point
from trainax_pk.checkpoint._store import Store

DATA = jax.random.normal(jax.random.key(0), (4, 9, 3))
KEY = jax.random.key(5)
TOTAL = 24
SERIES = {"loss": np.arange(40.0), "grad_norm": np.arange(40.0) ** 2}


def linear():
    return eqx.nn.Linear(3, 3, key=jax.random.key(1))


def make(**options):
    options = {
        "optimizer": optax.sgd(1e-2),
        "num_training_steps": TOTAL,
        "batch_size": 8,
        "checkpoints": Policy(every_seconds=None, every_steps=6, keep_last=1),
        "progress": False,
        **options,
    }
    return tx.trainer.SupervisedTrainer(DATA, **options)


@pytest.fixture(scope="module")
def trainer():
    """One for all: it is compiled once."""
    return make()


@pytest.fixture(scope="module")
def alone(trainer):
    return trainer(linear(), key=KEY)[0]


def steps(run_dir):
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir())


# The metric log.


def write_log(path, start=0, stop=40):
    log = MetricLog(path, 4)
    log.resume(start, {k: x[:start] for k, x in SERIES.items()})
    for a in range(start, stop, 10):
        log.add_record(a, "norm", np.float64(a))
        log.add_updates({k: x[a : a + 10] for k, x in SERIES.items()})
    log.flush()
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:7],
        lambda line: b"",
        lambda line: line.replace(b'"step": ', b'"step": "'),
        lambda line: line.replace(b"step", b"stop"),
        lambda line: b"\xff" + line[1:],
        # Another's: what was written for it is still there.
        lambda line: b'{"step": 4, "loss": 1.5, "grad_norm": 3.5}',
        lambda line: b'{"step": 3, "loss": 1.5, "grad_norm": 3.5}',
        lambda line: b'{"step": 20, "loss": 1.5, "grad_norm": 3.5}',
        lambda line: b'{"step": 38, "loss": 1.5, "grad_norm": 3.5}',
        lambda line: b'{"step": 8, "callback": [1]}',
        lambda line: b"[" * 100_000,
    ],
)
def test_a_damaged_line_costs_that_line_alone(damage, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = write_log(path).split(b"\n")
    broken = [*lines[:3], damage(lines[3]), *lines[4:]]
    assert json.loads(lines[3])["step"] == 10 and len(lines) == 15
    # Taken up where it was, before it, and with the last line torn as well.
    for content, start in (
        (b"\n".join(broken), 40),
        (b"\n".join(broken), 20),
        (b"\n".join(broken)[:-3], 20),
    ):
        path.write_bytes(content)
        with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl: line 4 is damaged"):
            again = write_log(path, start)
        assert again == b"\n".join([*lines[:3], *lines[4:]])
    path.write_bytes(b"\n".join(broken))
    if damage(lines[3])[:8] != b'{"step":':
        with pytest.warns(RuntimeWarning, match="line 4 is damaged, and left out"):
            found = read_metrics(path)
        assert found == [json.loads(x) for x in [*lines[:3], *lines[4:-1]]]


def test_lines_wait_while_the_disk_is_full(tmp_path):
    whole = write_log(tmp_path / "whole")
    log = MetricLog(tmp_path / "metrics.jsonl", 4)
    log.resume(0, {k: x[:0] for k, x in SERIES.items()})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for a in range(0, 40, 10):
        log.add_record(a, "norm", np.float64(a))
        part = {k: x[a : a + 10] for k, x in SERIES.items()}
        if a == 10:
            # The kernel itself takes a part of a line, and then no more.
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (log.path.stat().st_size + 9, hard)
            )
            try:
                with pytest.warns(RuntimeWarning, match=r"cannot be written to .*go"):
                    log.add_updates(part)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert whole.startswith(log.path.read_bytes())
        else:
            log.add_updates(part)
    log.flush()
    assert log.path.read_bytes() == whole


def test_lines_that_wait_until_the_end_are_counted(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def raising(step, model, batch):
        if step == 20 and fails:
            raise RuntimeError("the plot")
        return np.float64(step)

    monkeypatch.setattr(MetricLog, "_write", full)
    logged = make(callbacks=[tx.callback.Function(raising, 10, "plot")], log_every=4)
    # A line of every 4 updates, and what the callback returned at 0, 10, (20, 24).
    for fails, count in ((True, 5 + 2), (False, 6 + 4)):
        ends = pytest.raises(RuntimeError, match="the plot") if fails else nullcontext()
        with pytest.warns(RuntimeWarning) as caught, ends:
            logged(linear(), key=KEY, run_dir=tmp_path / str(fails))
        first, last = [str(w.message) for w in caught]
        assert "cannot be written to ([Errno 28]" in first
        assert f"metrics.jsonl lacks its last {count} lines, which could not" in last


# Checkpoints.


def test_what_could_not_be_saved_is_saved_when_asked_again(
    trainer, tmp_path, monkeypatch
):
    def full(folder, leaves):
        raise OSError(28, "No space left on device")

    state = tx.TrainState.create(linear(), trainer.optimizer, key=KEY)
    run = trainer._run(linear(), KEY, tmp_path, None, ())
    point = Point(6, lambda: lambda: ({"state.params.x": np.ones(2)}, {}), dict)
    with run:
        assert run.restore(state) is None
        with monkeypatch.context() as patched:
            patched.setattr(_store, "write_arrays", full)
            with pytest.raises(SaveFailed, match="goes on from its beginning"):
                run.save(point)
        run.save(point)
    assert steps(tmp_path) == [6]


def test_what_cannot_be_removed_is_no_failed_save(trainer, tmp_path, monkeypatch):
    rmtree = shutil.rmtree

    def stubborn(path, *args, **kwargs):
        if str(path).endswith("6.removing"):
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(_store.shutil, "rmtree", stubborn)
    with pytest.warns(RuntimeWarning) as caught:
        trainer(linear(), key=KEY, run_dir=tmp_path)
    (message,) = [str(w.message) for w in caught]
    assert message.startswith("Older checkpoints could not be removed (that of step 6")
    left, *others = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ".000000000006.removing" and others == [f"{TOTAL:012d}"]
    # A start that cannot remove it goes on; the next one can.
    with pytest.warns(RuntimeWarning, match="remove it by hand"):
        trainer(linear(), key=KEY, run_dir=tmp_path)
    monkeypatch.undo()
    trainer(linear(), key=KEY, run_dir=tmp_path)
    assert steps(tmp_path) == [TOTAL]


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("step", [12, TOTAL])
def test_a_folder_that_is_deleted_during_a_save(
    step, where, trainer, alone, tmp_path, monkeypatch
):
    write, run_dir, armed = _store.write_arrays, tmp_path / "run", [True]

    def remove():
        # At once: the main thread would put a lock into what is half removed.
        armed.clear()
        shutil.rmtree(run_dir.rename(tmp_path / "gone"))

    def deleting(folder, leaves):
        due = f"{step:012d}" in str(folder) and armed
        if due and where == "before":
            remove()
        write(folder, leaves)
        if due and where == "after":
            remove()

    monkeypatch.setattr(_store, "write_arrays", deleting)
    model, _ = trainer(linear(), key=KEY, run_dir=run_dir)
    assert not armed and eqx.tree_equal(model, alone)
    assert steps(run_dir) == [TOTAL]
    found, _ = tx.checkpoint.load_model(run_dir, linear())
    assert eqx.tree_equal(found, alone)


def test_the_result_is_not_lost_with_the_last_save(
    trainer, alone, tmp_path, monkeypatch
):
    def full(folder, leaves):
        raise OSError(28, "No space left on device")

    stop = Segment(epochs=2)
    trainer(linear(), key=KEY, run_dir=tmp_path, segment=stop)
    monkeypatch.setattr(_store, "write_arrays", full)
    message = rf"{TOTAL} updates in {tmp_path}.*No space left.*goes on from step 8 "
    with (
        pytest.warns(RuntimeWarning, match="A save failed"),
        pytest.raises(SaveFailed, match=message) as caught,
    ):
        trainer(linear(), key=KEY, run_dir=tmp_path)
    assert caught.value.step == TOTAL and eqx.tree_equal(caught.value.model, alone)
    monkeypatch.undo()
    assert eqx.tree_equal(trainer(linear(), key=KEY, run_dir=tmp_path)[0], alone)


def test_folders_that_are_made_are_made_durably(trainer, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def noted(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(_files.os, "fsync", noted)
    stop = Segment(epochs=1)
    trainer(linear(), key=KEY, run_dir=tmp_path / "a" / "b", segment=stop)
    made = (tmp_path, tmp_path / "a", tmp_path / "a" / "b")
    assert {str(p) for p in made} <= synced
    Store(tmp_path / "c" / "d").write(1, {"x": np.ones(2)}, {})
    assert {str(tmp_path), str(tmp_path / "c"), str(tmp_path / "c" / "d")} <= synced


# What is compared, and what is refused.


def test_the_most_that_may_be_skipped_may_change(tmp_path):
    stop = Segment(epochs=1)
    for limit in (3, 4):
        skipping = make(nonfinite="skip", max_skipped=limit)
        skipping(linear(), key=KEY, run_dir=tmp_path, segment=stop)
    events = (tmp_path / "events.jsonl").read_text().splitlines()
    changed = [json.loads(x).get("changed") for x in events]
    assert changed[2] == {"max_skipped": "3 was saved, now 4"}


RULES = {
    "nothing": (lambda path, x: None, r"got None, which is no PartitionSpec"),
    "a name": (lambda path, x: "data", r"\.params\.weight.*got 'data', which is no"),
    "no such axis": (lambda path, x: PartitionSpec("rows"), "not found in mesh"),
    "not divided": (
        lambda path, x: PartitionSpec("data"),
        r"\[3, 3\], on a .*'data': 4",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_give_no_sharding_are_refused(name):
    rule, message = RULES[name]
    sharded = make(mesh=jax.make_mesh((4,), ("data",)), parameters=rule)
    with pytest.raises(ValueError, match=message):
        sharded(linear(), key=KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "a"}, "`average` to be an integer >= 1, got 'a'"),
        ({"average": 0}, "`average` to be an integer >= 1, got 0"),
        ({"average": True}, "`average` to be an integer >= 1, got True"),
        ({"step": "a"}, "`step` to be an integer >= 0, got 'a'"),
        ({"step": -1}, "`step` to be an integer >= 0, got -1"),
    ],
)
def test_numbers_that_are_none_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tx.checkpoint.load_model(tmp_path, linear(), weights="ema", **options)


# What reads like a result of this run, and is not.


def numbers(history):
    return np.asarray(history.records["norm"].values)


def asked_of(factor, every=12):
    norm = lambda step, model, batch: factor * jnp.linalg.norm(model.weight)  # noqa: E731
    return [tx.callback.Function(norm, every, "norm")]


def test_results_of_a_run_whose_checkpoints_are_gone_are_not_taken_over(tmp_path):
    make(callbacks=asked_of(1.0))(linear(), key=KEY, run_dir=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    other = {"optimizer": optax.sgd(5e-2), "num_training_steps": 48}
    trainer = make(callbacks=asked_of(1.0), **other)
    half = Segment(epochs=24 * 8 / 32)
    part = trainer(linear(), key=KEY, run_dir=tmp_path, segment=half)[1]
    assert len(part.loss) == 24
    resumed = trainer(linear(), key=KEY, run_dir=tmp_path)[1]
    alone = trainer(linear(), key=KEY)[1]
    np.testing.assert_array_equal(numbers(resumed), numbers(alone))


def test_another_callback_of_the_same_name_is_asked(tmp_path):
    make(callbacks=asked_of(1.0))(linear(), key=KEY, run_dir=tmp_path)
    again = make(callbacks=asked_of(2.0))(linear(), key=KEY, run_dir=tmp_path)[1]
    once = make(callbacks=asked_of(2.0))(linear(), key=KEY)[1]
    np.testing.assert_array_equal(numbers(again)[-1], numbers(once)[-1])


def test_a_callback_that_raises_costs_no_update(tmp_path):
    def fails(step, model, batch):
        if step == 20:
            raise RuntimeError("the plot")
        return jnp.linalg.norm(model.weight)

    options = {"checkpoints": Policy(every_seconds=None, every_steps=1000)}
    callbacks = [tx.callback.Function(fails, 10, "norm")]
    with pytest.raises(RuntimeError, match="the plot"):
        make(callbacks=callbacks, **options)(linear(), key=KEY, run_dir=tmp_path)
    assert steps(tmp_path) == [20]


@pytest.mark.parametrize("name", ["lr=[1e-3]", "a*", "what?"])
def test_folders_whose_names_are_patterns_are_refused(name, trainer, tmp_path):
    with pytest.raises(ValueError, match="`run_dir` without the signs"):
        trainer(linear(), key=KEY, run_dir=tmp_path / name)


PLACES = {
    "nothing": ("", ValueError, "`run_dir` to be the path of a folder, got ''"),
    "blank": (" ", ValueError, "`run_dir` to be the path of a folder, got ' '"),
    "no path": ("a\0b", ValueError, "`run_dir` to be the path of a folder, got 'a"),
    "a file": ("file", ValueError, "where .*/file is a file. Name another one"),
    "under a file": ("file/a/b", ValueError, "where .*/file is a file. Name"),
    "over a file": ("full", ValueError, "where .*/full/checkpoints is a file"),
    "over a folder": ("odd", ValueError, r"where metrics\.jsonl is a folder"),
    "refused": ("refused/a", PermissionError, r"that can be made, got .*/refused/a \("),
    "read-only": ("locked", PermissionError, "that can be written to, got .*/locked,"),
    "a file of another": ("theirs", PermissionError, r"where .*/events\.jsonl cannot"),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_where_no_run_can_live_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("file", "full/checkpoints", "theirs/events.jsonl"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    for path in ("odd/metrics.jsonl", "locked", "refused"):
        (tmp_path / path).mkdir(parents=True)
    access, mkdir = os.access, os.mkdir

    # Whoever runs tests as root may do everything.
    def denied(path, mode):
        return access(path, mode) and not str(path).endswith(("locked", "events.jsonl"))

    def refusing(path, *args, **kwargs):
        if "refused" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "access", denied)
    monkeypatch.setattr(os, "mkdir", refusing)
    before = sorted(tmp_path.rglob("*"))
    folder, kind, message = PLACES[name]
    trainer = make()
    with pytest.raises(kind, match=message) as caught:
        trainer(linear(), key=KEY, run_dir=folder)
    assert type(caught.value) is kind and trainer.engine.num_traces == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_whose_file_is_removed_is_taken_anew(tmp_path):
    path = tmp_path / "lock"
    with hold_lock(path, 0.0, "it", "") as lock:
        own = path.read_text()
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        assert holder.items() <= json.loads(own).items()
        lock.renew()
        path.unlink()
        lock.renew()
        with pytest.raises(TimeoutError), hold_lock(path, 0.0, "it", ""):
            pass
        path.unlink()
        with hold_lock(path, 0.0, "it", ""), pytest.raises(TimeoutError):
            lock.renew()
        # One that has ended has been there all the same.
        path.write_text('{"pid": 1, "host": "another"}')
        with pytest.raises(TimeoutError, match='"pid": 1, "host": "another"'):
            lock.renew()
        # So has another of the same process.
        path.unlink()
        with hold_lock(path, 0.0, "it", ""):
            pass
        with pytest.raises(TimeoutError, match=f'"pid": {os.getpid()}'):
            lock.renew()
        # A copy of its own, put back.
        path.unlink()
        path.write_text(own)
        lock.renew()
        with pytest.raises(TimeoutError), hold_lock(path, 0.0, "it", ""):
            pass
    with hold_lock(path, 0.0, "it", ""):
        pass


def test_a_full_disk_costs_no_lock(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    path = tmp_path / "lock"
    with hold_lock(path, 0.0, "it", "") as lock:
        path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="No space"):
                lock.renew()
        assert path.read_text() == ""
        lock.renew()
        assert str(os.getpid()) in path.read_text()
        with pytest.raises(TimeoutError), hold_lock(path, 0.0, "it", ""):
            pass
        # Another that has just begun, and has not written yet.
        path.unlink()
        with hold_lock(path, 0.0, "it", ""):
            path.write_text("")
            with pytest.raises(TimeoutError):
                lock.renew()


def test_a_lock_where_open_files_have_numbers_of_their_own(tmp_path, monkeypatch):
    opened = []

    def counting(*args):
        opened.append(args)
        assert len(opened) < 100, "it spins"
        return open_file(*args)

    open_file, path = os.open, tmp_path / "lock"
    monkeypatch.setattr(os, "open", counting)
    monkeypatch.setattr(os.path, "samestat", lambda a, b: False)
    with hold_lock(path, 0.0, "it", "") as lock:
        lock.renew()
        with pytest.raises(TimeoutError), hold_lock(path, 0.0, "it", ""):
            pass


def test_whoever_comes_after_a_folder_was_deleted_is_refused(alone, tmp_path):
    run_dir = tmp_path / "run"

    def look(step, model, batch):
        if step == 8:
            # Between two saves.
            folder = run_dir / "checkpoints"
            while not (folder / f"{6:012d}").exists() or list(folder.glob(".*")):
                time.sleep(0.01)
            shutil.rmtree(run_dir.rename(tmp_path / "gone"))
        if step == 16:
            lock = hold_lock(run_dir / "lock", 0.0, "it", "")
            with pytest.raises(TimeoutError, match="no other writer of it"), lock:
                pass
        return jnp.zeros(())

    watched = make(callbacks=[tx.callback.Function(look, 8, "look")])
    model, history = watched(linear(), key=KEY, run_dir=run_dir)
    assert history.records["look"].steps == (0, 8, 16, TOTAL)
    assert eqx.tree_equal(model, alone) and steps(run_dir) == [TOTAL]


@pytest.mark.parametrize("step", [6, TOTAL])
def test_a_deleted_folder_belongs_to_whoever_came_first(
    step, trainer, alone, tmp_path, monkeypatch
):
    write, run_dir, other = _store.write_arrays, tmp_path / "run", tmp_path / "other"
    came = []

    # In the middle of a save, which is tried again, and must not end up with others'.
    def deleting(folder, leaves):
        if f"{step:012d}" in str(folder) and not came:
            came.append(step)
            time.sleep(0.2)  # until the main thread waits for this save
            os.rename(run_dir, tmp_path / "gone")
            os.rename(other, run_dir)
        write(folder, leaves)

    # They may be in the middle of the same save.
    passing = ["checkpoints", f"checkpoints/.{6:012d}.writing"][: 2 * (step == 6)]
    for name in ("", *passing):
        (other / name).mkdir()
    monkeypatch.setattr(_store, "write_arrays", deleting)
    message = r"keep its folder, got that it was removed .* \{\"pid\": \d+"
    with (
        hold_lock(other / "lock", 0.0, "it", ""),
        pytest.raises(SaveFailed, match=message) as caught,
    ):
        trainer(linear(), key=KEY, run_dir=run_dir)
    assert caught.value.step == step
    assert step < TOTAL or eqx.tree_equal(caught.value.model, alone)
    left = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*")}
    assert {"lock", *passing} <= left <= {"lock", "checkpoints", *passing}


def test_lines_that_wait_are_not_written_into_the_folder_of_another(
    tmp_path, monkeypatch
):
    run_dir, write, lost = tmp_path / "run", MetricLog._write, []

    def full(log, content):
        if not lost:
            raise OSError(28, "No space left on device")
        write(log, content)

    def look(step, model, batch):
        if step == 8:
            lost.append(run_dir.rename(tmp_path / "gone"))
            run_dir.mkdir()
            with hold_lock(run_dir / "lock", 0.0, "it", ""):
                pass
        return jnp.zeros(())

    monkeypatch.setattr(MetricLog, "_write", full)
    options = {"log_every": 4, "checkpoints": Policy(every_seconds=None)}
    watched = make(callbacks=[tx.callback.Function(look, 8, "look")], **options)
    with (
        pytest.warns(RuntimeWarning, match="cannot be written to.*No space"),
        pytest.warns(RuntimeWarning, match=r"lacks its last 3 lines.*another process"),
        pytest.raises(SaveFailed, match="another process has begun there"),
    ):
        watched(linear(), key=KEY, run_dir=run_dir)
    assert [p.name for p in run_dir.iterdir()] == ["lock"]


def test_foreign_folders_among_checkpoints_are_left_alone(trainer, alone, tmp_path):
    for name in ("9999", "²"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for _ in range(2):
        model, _ = trainer(linear(), key=KEY, run_dir=tmp_path)
        np.testing.assert_array_equal(model.weight, alone.weight)
