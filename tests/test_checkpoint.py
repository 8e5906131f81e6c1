"""Checkpoints on disk: whole or not there; damage is found, and nothing older is lost."""

import errno
import hashlib
import os
import resource
import shutil
import signal
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import trainax_pk as tx
from trainax_pk import _signals
from trainax_pk._files import LocalFiles, seal, unseal
from trainax_pk._signals import Interrupts
from trainax_pk.checkpoint import (
    CheckpointDamaged,
    Policy,
    Segment,
    _store,
)
from trainax_pk.checkpoint._arrays import (
    compare_leaves,
    digest,
    fill,
    make_leaves,
    name_leaves,
)
from trainax_pk.checkpoint._log import MetricLog
from trainax_pk.checkpoint._policy import Schedule
from trainax_pk.checkpoint._store import Store
from trainax_pk.checkpoint._writer import NotFinite, SaveFailed, Writer


def arrays(step):
    """A small state that tells its step."""
    return {
        "state.params.weight": np.arange(6.0).reshape(2, 3) + step,
        "state.ema.weight": np.arange(6.0).reshape(2, 3) - step,
        "state.step": np.int32(step),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three checkpoints."""
    store = Store(tmp_path_factory.mktemp("written"))
    for step in (10, 20, 30):
        store.write(step, arrays(step), {"note": step})
    return store


@pytest.fixture
def store(written, tmp_path):
    """A copy of three checkpoints."""
    shutil.copytree(written.folder, tmp_path / "checkpoints")
    return Store(tmp_path / "checkpoints")


def tree_digest(folder):
    sha = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        sha.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return sha.hexdigest()


def test_every_type_comes_back_bit_by_bit(tmp_path):
    tree = {
        "float": jnp.array([1.5, np.nan, -0.0]),
        "half": jnp.arange(3, dtype=jnp.bfloat16) / 3,
        "small": jnp.arange(4).astype(jnp.float8_e4m3fn),
        "complex": jnp.array([1 + 2j, np.inf]),
        "int": np.int32(7),
        "flag": np.array([True, False]),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 2),
        "same name": {"a b": jnp.ones(1), "a.b": jnp.zeros(1)},
        "transposed": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    store = Store(tmp_path)
    store.write(3, name_leaves(tree, "state"), {"list": [1, None]})
    found = store.newest()
    assert found.step == 3 and found.meta == {"list": [1, None]}
    assert not compare_leaves(found.leaves, tree, "state")
    back = fill(tree, found.arrays, "state")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(back), strict=True
    ):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        (one, two) = (make_leaves({"x": x})[0][0].digest for x in (a, b))
        assert one == two, path


def test_leaves_that_do_not_fit_are_named(written):
    found = written.read(10)
    asked = {"params": {"weight": jnp.zeros((2, 3), jnp.float32), "bias": jnp.ones(2)}}
    dots = {f"state{k}": v for k, v in {"['params']['weight']": 0}.items()}
    leaves = dict(zip(dots, [found.leaves["state.params.weight"]], strict=True))
    leaves["state.gone"] = found.leaves["state.step"]
    assert compare_leaves(leaves, asked, "state") == {
        "state['params']['weight']": "float64[2, 3] was saved, now float32[2, 3]",
        "state['params']['bias']": "nothing was saved, now float64[2]",
        "state.gone": "int32[] was saved, now nothing",
    }


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damage_is_found_and_set_aside(written, tmp_path, data):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    shutil.copytree(written.folder, folder)
    store = Store(folder)
    newest = folder / f"{30:012d}"
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    kind = data.draw(st.sampled_from(["truncate", "empty", "delete", "flip"]))
    victims = [p for p in files if kind == "delete" or p.stat().st_size]
    damage(data, data.draw(st.sampled_from(victims)), kind)
    with pytest.warns(RuntimeWarning, match="step 30 is damaged .* moved to"):
        found = store.newest()
    assert found.step == 20 and np.array_equal(
        found.arrays["state.params.weight"], arrays(20)["state.params.weight"]
    )
    assert store.steps() == [10, 20]
    assert (folder / "damaged" / f"{30:012d}-0").is_dir()


def test_each_file_of_a_checkpoint_is_guarded(written, tmp_path):
    """Every file, in each of four ways, once; hypothesis above chooses where."""
    newest = written.folder / f"{30:012d}"
    names = [p.relative_to(newest) for p in newest.rglob("*") if p.is_file()]
    assert {"manifest.json", "ema.safetensors"} <= {n.as_posix() for n in names}
    for name in names:
        content = (newest / name).read_bytes()
        middle = len(content) // 2
        flipped = (
            content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]
        )
        for broken in (content[:-1], b"", None, flipped):
            victim = tmp_path / "checkpoints" / newest.name
            shutil.copytree(newest, victim)
            (victim / name).unlink()
            if broken is not None:
                (victim / name).write_bytes(broken)
            with pytest.raises(CheckpointDamaged):
                Store(tmp_path / "checkpoints").read(30)
            shutil.rmtree(victim)


def damage(data, path, kind):
    content = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncate":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])


def test_if_none_is_valid_all_are_named_and_nothing_moves(store):
    for i, path in enumerate(sorted(store.folder.iterdir())):
        victim = path / "manifest.json"
        victim.unlink() if i else victim.write_text("{}")
    before = tree_digest(store.folder)
    with pytest.raises(
        CheckpointDamaged, match=r"got none \(30: .*20: .*10: "
    ) as error:
        store.newest()
    assert sorted(error.value.problems) == [10, 20, 30]
    assert tree_digest(store.folder) == before


def test_a_step_that_was_set_aside_is_written_anew(store):
    for i in range(2):
        (store.folder / f"{30:012d}" / "manifest.json").unlink()
        with pytest.warns(RuntimeWarning, match=f"damaged/{30:012d}-{i}"):
            assert store.newest().step == 20
        store.write(30, arrays(30), {})
        assert store.newest().step == 30


def test_a_checkpoint_under_another_name_is_damaged(store):
    os.rename(store.folder / f"{30:012d}", store.folder / f"{40:012d}")
    with pytest.raises(CheckpointDamaged, match="is that of step 30"):
        store.read(40)


def test_a_later_schema_is_not_damage(store):
    files = LocalFiles(store.folder / f"{30:012d}")
    manifest = unseal(files.read("manifest.json"))
    files.write("manifest.json", seal({**manifest, "schema": 99}))
    with pytest.raises(ValueError, match="schema 2 or older, got 99"):
        store.newest()


def refuse(*unused, **also_unused):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(folder, leaves):
    folder.mkdir()
    (folder / "part").write_bytes(b"half")
    refuse()


@pytest.mark.parametrize(
    ("name", "failing"),
    [("write_arrays", half_written), ("seal", refuse), ("read_arrays", refuse)],
)
def test_a_failed_save_leaves_the_others_and_the_next_one_works(
    store, monkeypatch, name, failing
):
    before = tree_digest(store.folder)
    with monkeypatch.context() as patch:
        patch.setattr(_store, name, failing)
        with pytest.raises(OSError, match="No space left"):
            store.write(40, arrays(40), {})
    assert tree_digest(store.folder) == before
    store.write(40, arrays(40), {})
    assert store.newest().step == 40


@pytest.mark.parametrize("name", ["mkdir", "rename"])
def test_a_folder_that_cannot_be_written_to_is_told(store, monkeypatch, name):
    def read_only(*unused, **also_unused):
        raise PermissionError(errno.EROFS, "Read-only file system")

    before = tree_digest(store.folder)
    with monkeypatch.context() as patch:
        patch.setattr(_store.os, name, read_only)
        with pytest.raises(OSError, match="Read-only"):
            store.write(40, arrays(40), {})
    assert store.newest().step == 30 and tree_digest(store.folder) == before
    store.write(40, arrays(40), {})
    assert store.newest().step == 40


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_file_system_that_takes_no_more_is_told(store):
    """The kernel itself refuses: no file of this process may grow beyond a limit."""
    before = tree_digest(store.folder)
    large = {
        **arrays(40),
        "state.params.large": np.random.default_rng(0).normal(size=9999),
    }
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(Exception, match="File too large|EFBIG|too large"):
            store.write(40, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.steps() == [10, 20, 30] and tree_digest(store.folder) == before
    store.write(40, large, {})
    assert store.newest().step == 40


def test_averages_are_files_of_their_own(tmp_path):
    averages = {
        "state.ema.a[0]": np.arange(3.0),
        "state.more_ema[0].a[0]": np.arange(3.0) * 2,
        "state.more_ema[1].a[0]": np.arange(3, dtype=np.int8),
        "state.more_ema[1].b": np.array([1j]),  # which the format does not know
        "state.more_ema[1].none": np.zeros((0, 2)),
    }
    store = Store(tmp_path)
    store.write(7, {**arrays(7), **averages}, {})
    folder = tmp_path / f"{7:012d}"
    for number, name in enumerate(("ema", "ema-2", "ema-3")):
        found = load_file(folder / f"{name}.safetensors")
        assert np.array_equal(found[".a[0]"], list(averages.values())[number])
    back = store.read(7).arrays
    assert all(np.array_equal(back[path], x) for path, x in averages.items())


def test_what_was_not_written_right_is_never_committed(store, monkeypatch):
    write = _store.write_arrays

    def wrong(folder, leaves):
        write(folder, [(leaf, x * 0) for leaf, x in leaves])

    monkeypatch.setattr(_store, "write_arrays", wrong)
    log = MetricLog(store.folder.parent / "metrics.jsonl", 10)
    writer = Writer(store, Schedule(Policy(keep_last=1), 100, Fraction(10)), log)
    writer.begin({40: lambda: (arrays(40), {})}, {}, set())
    error = writer.take_error()
    writer.close()
    assert isinstance(error, CheckpointDamaged) and "state.params" in str(error)
    # Nothing was removed for it either, although one was to be kept.
    assert store.steps() == [10, 20, 30]


def test_states_that_are_not_finite_are_not_saved(store):
    log = MetricLog(store.folder.parent / "metrics.jsonl", 10)
    writer = Writer(store, Schedule(Policy(), 100, Fraction(10)), log)
    bad = {**arrays(40), "state.params.weight": np.array([1.0, np.nan])}
    writer.begin({40: lambda: (bad, {})}, {}, set())
    error = writer.take_error()
    writer.close()
    assert isinstance(error, NotFinite) and store.steps() == [10, 20, 30]


def test_checkpoints_of_another_are_not_removed(store):
    def lost(step):
        raise SaveFailed("another process has begun there", step)

    log = MetricLog(store.folder.parent / "metrics.jsonl", 10)
    schedule = Schedule(Policy(keep_last=1), 100, Fraction(10))
    writer = Writer(Store(store.folder, lost), schedule, log)
    writer.begin({30: lambda: (arrays(30), {})}, {}, set())
    error = writer.take_error()
    writer.close()
    assert isinstance(error, SaveFailed) and error.step == 30
    assert store.steps() == [10, 20, 30]


def test_what_a_killed_process_left_is_tidied(store):
    left = (".000000000040.writing", ".000000000040.0a1b2c3d.writing")
    for name in (*left, ".000000000010.removing"):
        (store.folder / name).mkdir()
        (store.folder / name / "part").write_bytes(b"half")
    assert store.steps() == [10, 20, 30] and store.newest().step == 30
    store.tidy()
    assert sorted(p.name for p in store.folder.iterdir()) == [
        f"{step:012d}" for step in (10, 20, 30)
    ]


def test_readers_move_nothing(store):
    (store.folder / f"{30:012d}" / "manifest.json").unlink()
    with pytest.warns(RuntimeWarning, match="stays where it is"):
        assert store.newest(move=False).step == 20
    assert store.steps() == [10, 20, 30]


# policy, steps of a run of 100 updates, 8 updates per epoch -> kept
KEPT = {
    "last": (Policy(keep_last=2), [10, 20, 30], {20, 30}),
    "steps": (Policy(keep_last=1, keep_steps=20), [10, 20, 30, 40, 50], {20, 40, 50}),
    "epochs": (
        Policy(keep_last=1, keep_epochs="2::4"),
        [8, 16, 24, 48, 50],
        {16, 48, 50},
    ),
    "last epochs": (
        Policy(keep_last=1, keep_epochs="-2:"),
        [80, 88, 96, 99],
        {88, 96, 99},
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_retention(case):
    policy, steps, kept = KEPT[case]
    assert Schedule(policy, 100, Fraction(8)).kept(steps) == kept


def test_saves_by_number_are_met_exactly():
    policy = Policy(every_steps=30, keep_steps=50, keep_epochs="::3")
    schedule = Schedule(policy, 100, Fraction(15, 2))
    done, due = 0, []
    while (gap := schedule.gap(done)) is not None and done + gap <= 100:
        done += gap
        assert schedule.is_due(done)
        due.append(done)
    # Epochs 3, 6, 9, 12 end in the updates 23, 45, 68, 90.
    assert due == [23, 30, 45, 50, 60, 68, 90, 100]
    assert Schedule(Policy(), 100, Fraction(8)).gap(0) is None


def test_the_newest_is_kept_whatever_the_policy(store):
    store.retain(lambda steps: set())
    assert store.steps() == [30]


BAD = {
    "seconds": (
        lambda: Policy(every_seconds=-1),
        "`every_seconds` to be a number >= 0",
    ),
    "steps": (lambda: Policy(every_steps=0), "`every_steps` to be an integer >= 1"),
    "last": (lambda: Policy(keep_last=0), "`keep_last` to be an integer >= 1"),
    "keep": (lambda: Policy(keep_steps=0.5), "`keep_steps` to be an integer >= 1"),
    "epochs": (lambda: Policy(keep_epochs="ten"), "`keep_epochs` to be a slice"),
    "an epoch": (lambda: Policy(keep_epochs=5), "a slice of integers, got 5"),
    "a bool": (
        lambda: Policy(keep_epochs=slice(None, None, True)),
        r"a slice of integers, got slice\(None, None, True\)",
    ),
    "no steps": (lambda: Policy(keep_epochs="::0"), "a slice of integers, got '::0'"),
    "parts": (lambda: Policy(keep_epochs=slice(0.5)), r"got slice\(None, 0\.5"),
    "saves": (lambda: Policy(every_steps=True), "`every_steps` to be an integer"),
    "segment": (lambda: Segment(), "`epochs` or `minutes`"),
    "minutes": (lambda: Segment(minutes=0), "`epochs` or `minutes`"),
    "text": (lambda: Segment(epochs="3"), "a positive number, got '3'"),
    "weights": (
        lambda: tx.checkpoint.load_model("x", None, weights="best"),
        "'current' or 'ema'",
    ),
    "a folder": (
        lambda: tx.checkpoint.load_model(3, None),
        "`run_dir` to be the path of a folder, got 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_remedy(case):
    run, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run()


def test_the_log_has_no_line_twice_however_it_is_cut(tmp_path):
    losses = np.random.default_rng(0).normal(size=57)
    series = {"loss": losses, "grad_norm": losses**2}

    def write(path, cuts, start=0):
        log = MetricLog(path, 10)
        log.resume(start, {k: x[:start] for k, x in series.items()})
        for a, b in zip([start, *cuts], [*cuts, 57], strict=True):
            if a % 20 == 0 or a == start:
                log.add_record(a, "norm", {"a": np.float64(a), "b": np.inf})
            log.add_updates({k: x[a:b] for k, x in series.items()})
        log.flush()
        return path.read_bytes()

    whole = write(tmp_path / "whole", [20, 40])
    assert whole.count(b"\n") == 8
    cut = tmp_path / "cut"
    write(cut, [7, 20, 23, 40])
    assert cut.read_bytes() == whole
    # Taken up from 40 after having gone further, with the last line torn.
    cut.write_bytes(cut.read_bytes()[:-9])
    assert write(cut, [44], start=40) == whole
    lines = tx.checkpoint.read_metrics(cut)
    assert lines[0] == {
        "step": 0,
        "callback": "norm",
        "norm['a']": 0.0,
        "norm['b']": None,
    }
    assert lines[2]["loss"] == np.mean(losses[10:20])


def test_signals_are_noted_and_handlers_restored():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received == signal.SIGTERM
        interrupts.saving = True
        os.kill(os.getpid(), signal.SIGINT)  # the save is let finish
        assert isinstance(interrupts.end(), SystemExit) and interrupts.end().code == 143
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]


def test_a_second_signal_outside_of_a_save_ends_without_saving():
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_third_signal_ends_at_once():
    pid = os.fork()
    if pid == 0:
        with Interrupts() as interrupts:
            interrupts.saving = True
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_deaf_main_thread_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(_signals, "_PATIENCE", 0.05)
    note = tmp_path / "saved"
    pid = os.fork()
    if pid == 0:
        with Interrupts(lambda: note.write_text("yes")):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert note.read_text() == "yes"


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_third_signal_ends_a_deaf_process_at_once():
    pid = os.fork()
    if pid == 0:
        with Interrupts():
            # The other thread is interrupted, this one hears nothing.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            time.sleep(60)
        os._exit(0)
    time.sleep(0.5)
    for _ in range(3):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
    began = time.monotonic()
    os.waitpid(pid, 0)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_others_keep_among_checkpoints_is_left_alone(kind, tmp_path):
    store = Store(tmp_path)
    store.write(1, arrays(1), {})
    other = tmp_path / ".DS_Store"
    other.mkdir() if kind == "folder" else other.write_text("x")
    (tmp_path / ".000000000002.writing").mkdir()
    store.tidy()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".DS_Store", "000000000001"]
    store.write(3, arrays(3), {})
    (tmp_path / "000000000003/manifest.json").unlink()
    (tmp_path / "000000000003/manifest.json").mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert store.newest().step == 1


def test_who_listens_already_is_left_alone():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    with Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.set_wakeup_fd(-1) == writer
    assert os.read(reader, 1) == bytes([signal.SIGINT])
    os.close(reader)
    os.close(writer)


def test_nothing_is_installed_off_the_main_thread():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_digest_is_that_of_the_bytes():
    x = np.arange(6.0).reshape(2, 3)
    expected = hashlib.sha256(x.tobytes()).hexdigest()
    assert digest(x) == digest(np.asfortranarray(x)) == expected


def test_a_model_of_other_width_is_refused_or_taken_in_part(store):
    class Model(eqx.Module):
        weight: jax.Array
        bias: jax.Array

    model = Model(jnp.zeros((2, 3)), jnp.zeros(2))
    with pytest.raises(
        ValueError, match=r"\.bias: nothing was saved, now float64\[2\]"
    ):
        tx.checkpoint.load_model(store.folder.parent, model)
    loaded, match = tx.checkpoint.load_model(store.folder.parent, model, partial=True)
    assert np.array_equal(loaded.weight, arrays(30)["state.params.weight"])
    assert match.step == 30 and match.matched == (".weight",) and not match.unused
    assert match.missing == (".bias: nothing was saved, now float64[2]",)
    loaded, _ = tx.checkpoint.load_model(
        store.folder.parent, model, partial=True, step=10
    )
    assert np.array_equal(loaded.weight, arrays(10)["state.params.weight"])
    with pytest.raises(ValueError, match="2 moving averages"):
        tx.checkpoint.load_model(store.folder.parent, model, weights="ema", average=2)
    with pytest.raises(FileNotFoundError, match=r"steps \[10, 20, 30\]"):
        tx.checkpoint.load_model(store.folder.parent, model, step=11)
    with warnings.catch_warnings(), pytest.raises(FileNotFoundError, match="got none"):
        tx.checkpoint.load_model(store.folder, model)
