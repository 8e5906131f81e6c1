"""Caches: what was written is what is read, or an error says where it is not."""

import errno
import importlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import tfrecord
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainax_pk import _files
from trainax_pk._files import LocalFiles, seal, unseal
from trainax_pk.data import (
    CacheDamaged,
    CachedDataset,
    Normal,
    Product,
    SimulationDataset,
    StepperModel,
    _cache_generate,
)
from trainax_pk.data._cache_manifest import make_leaves
from trainax_pk.data._cache_parts import _own
from trainax_pk.data._items import as_items
from trainax_pk.data._tfrecord_store import masked_crc32c
from trainax_pk.data._zarr_store import ZarrStore

DRIVER = Path(__file__).parent / "_cache_driver.py"
FORMATS = ["zarr", "parquet", "tfrecord"]
# A program is compiled for every device.
ONE = jax.local_devices()[:1]
formats = pytest.mark.parametrize("format", FORMATS)


class Rows:
    """A source that is no simulation: any class with these four methods."""

    def __init__(self, num_rows=22, scale=1.0):
        self.num_rows, self.scale = num_rows, scale
        self.calls = []
        self.fail_at = {}

    def __len__(self):
        return self.num_rows

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(self.num_rows)
        self.calls.append((start, stop))
        if start in self.fail_at:
            raise self.fail_at.pop(start)
        i = np.arange(start, stop)
        return {
            "double": self.scale * np.sqrt(i)[:, None] * np.array([1.0, -2.0]),
            "single": np.cos(i[:, None, None] + np.arange(6.0).reshape(2, 3)).astype(
                "f4"
            ),
            "half": (i / 7).astype("f2"),
            "brain": np.asarray(jnp.asarray(i / 7, jnp.bfloat16)),
            "integer": -i.astype(np.int16),
            "bool": i % 3 == 0,
            "complex": (i * (1 + 2j)).astype("c8"),
            "zeros": np.zeros((stop - start, 3)),
        }

    def with_split(self, split):
        return Rows(self.num_rows, {"train": 1.0, "val": 2.0}[split])

    def content_hash(self):
        return f"rows-{self.num_rows}-{self.scale}-" + 40 * "0"


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    alike = jax.tree.structure(a) == jax.tree.structure(b)
    return alike and all(
        (x.dtype, x.shape) == (y.dtype, y.shape)
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


def rows_of(tree, rows):
    return jax.tree.map(lambda x: x[rows], tree)


def contents(folder):
    paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in paths
        if p.suffix != ".lock"
    }


# Round trips


@formats
def test_every_dtype_comes_back_bit_by_bit(format, tmp_path):
    source = Rows()
    whole = source[:]
    cached = CachedDataset(source, tmp_path, format, chunk_size=10)
    assert same(cached[:], whole)
    assert source.calls[-5:] == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 22)]
    for rows in (
        slice(3, 4),
        slice(4, 11),
        slice(21, 30),
        slice(1, 20, 6),
        slice(7, 7),
    ):
        assert same(cached[rows], rows_of(whole, rows))
    picked = np.array([21, 0, -1, 7, 7, 4])
    assert same(cached[picked], rows_of(whole, picked))
    assert same(cached[-2], rows_of(whole, 20))
    assert same(jax.tree.map(lambda *x: np.stack(x), *cached), whole)
    assert len(cached) == 22
    # Read by another object: nothing is made again.
    again = Rows()
    other = CachedDataset(again, tmp_path, format, chunk_size=6)
    assert same(other[:], whole) and again.calls == [(0, 1)]
    other.verify(full=True)
    with pytest.raises(IndexError, match=r"in \[-22, 22\), got 22"):
        cached[22]


def simulation(rate=0.9, **options):
    def build(params):
        return params["rate"] * params["u"]

    prior = Product({"rate": Normal(rate, 0.1), "u": Normal(jnp.zeros(2), 1.0)})
    return SimulationDataset(build, prior, 11, block_size=4, devices=ONE, **options)


@pytest.fixture(scope="module")
def simulated():
    return simulation()


@formats
def test_a_simulation_is_stored_as_it_is_made(format, simulated, tmp_path):
    source = simulated
    cached = CachedDataset(source, tmp_path, format, chunk_size=8)
    assert same(cached[:], source[:])
    assert cached.content_hash() == source.content_hash()
    held_out = cached.with_split("val")
    assert same(held_out[2:5], source.with_split("val")[2:5])
    assert held_out.directory != cached.directory
    assert not np.isin(held_out[:][1], cached[:][1]).any()


def test_changed_physics_never_read_a_stale_cache(simulated, tmp_path):
    first = CachedDataset(simulated, tmp_path)
    second = CachedDataset(simulation(0.8), tmp_path)
    third = CachedDataset(simulation(0.9, seed=1), tmp_path)
    assert not np.isin(first[:][1], second[:][1]).any()
    assert not np.isin(first[:][1], third[:][1]).any()
    assert len({first.directory, second.directory, third.directory}) == 3


def test_trajectories_and_failures_come_along(tmp_path):
    grows = StepperModel(lambda u: u * jnp.where(u > 1, jnp.inf, 1.0), dt=1.0)
    source = SimulationDataset(
        grows, Normal(jnp.zeros(1), 1.0), 40, num_steps=2, on_failure="mask",
        devices=ONE,
    )  # fmt: skip
    bad = source.simulate(slice(None)).failed.sum()
    assert bad > 0
    cached = CachedDataset(source, tmp_path, chunk_size=32)
    cached.generate()
    assert cached.num_failed == bad
    reopened = CachedDataset(source, tmp_path)
    reopened.generate()
    assert reopened.num_failed == bad
    with pytest.raises(ValueError, match="finite"):
        reopened.trajectories()  # masked samples are NaN, and trajectories say so
    fine = SimulationDataset(
        StepperModel(jnp.sin, dt=1.0), Normal(jnp.zeros(1), 1.0), 8, num_steps=2,
        devices=ONE,
    )  # fmt: skip
    stored = CachedDataset(fine, tmp_path).trajectories()
    assert same(stored.state, fine[:][1]) and stored.num_times == 3
    with pytest.raises(ValueError, match="source of trajectories"):
        CachedDataset(simulation(), tmp_path).trajectories()


def masked(num_samples=64, **options):
    return SimulationDataset(
        StepperModel(lambda u: jnp.where(u > 1.0, jnp.nan, u), dt=1.0),
        Normal(jnp.zeros(1), 1.0), num_samples, num_steps=4, on_failure="mask",
        devices=ONE, **options,
    )  # fmt: skip


@pytest.mark.parametrize("pairs", [False, True])
def test_masked_failures_are_refused_wherever_the_data_are(pairs, tmp_path):
    source = masked()
    if pairs:
        source = SimulationDataset(
            lambda u: jnp.where(u > 1.0, jnp.nan, u), Normal(jnp.zeros(1), 1.0), 64,
            on_failure="mask", devices=ONE,
        )  # fmt: skip
    cached = CachedDataset(source, tmp_path, chunk_size=8)
    bad = int(source.simulate(slice(None)).failed.sum())
    message = f"finite.*got {bad} of 64 samples that failed and were masked.*resample"
    for data, residency in (
        (source, "device"), (source, "host"), (cached, "device"), (cached, "host"),
        (cached, "disk"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            as_items(data, lambda trajectories: 2, residency=residency)


def test_parts_that_failed_by_chance_are_stored_however_it_is_cut(tmp_path):
    def rare(u):
        return jnp.where(u > 1.0, u, jnp.nan)

    # Of 20 and more samples in a row none succeeds.
    source = SimulationDataset(
        rare, Normal(jnp.zeros(1), 1.0), 512, on_failure="mask", devices=ONE,
        block_size=32,
    )  # fmt: skip
    whole = source[:]
    bad = source.simulate(slice(None)).failed
    rows = np.flatnonzero(bad)[:20]
    assert bad.any() and not bad.all() and np.isnan(source[rows][1]).all()
    for chunk_size in (None, 4, 32):
        cached = CachedDataset(
            source, tmp_path / str(chunk_size), chunk_size=chunk_size
        )
        assert same(cached[:], whole) and cached.num_failed == bad.sum()


@pytest.mark.parametrize("chunk_size", [4, 10, 14, 64])
def test_no_block_is_simulated_twice(chunk_size, tmp_path, monkeypatch):
    source = masked(61, block_size=16)
    whole, bad = source[:], source.num_failed
    made, block = [], source._runner._block
    monkeypatch.setattr(
        source._runner, "_block", lambda *args: made.append(args) or block(*args)
    )
    cached = CachedDataset(source, tmp_path, chunk_size=chunk_size)
    assert same(cached[:], whole) and cached.num_failed == bad
    assert len(made) == 4
    # One part alone is made again with the rest of its block at most.
    part = sorted(Path(cached.directory).rglob("c.1.*"))[:1]
    if part:
        before = contents(cached.directory)
        part[0].write_bytes(b"")
        CachedDataset(source, tmp_path).repair()
        assert contents(cached.directory) == before


@pytest.mark.parametrize("num_samples", [1030, 2100, 5000])
def test_the_last_part_takes_no_more_of_the_disk_than_it_holds(
    num_samples, tmp_path, monkeypatch
):
    # A shard is as long as any: with whole parts of 1024 rows the first takes twice.
    monkeypatch.setattr(_cache_generate, "_PART_BYTES", 2**20)

    class Wide(Rows):
        def __getitem__(self, rows):
            start, stop, _ = rows.indices(self.num_rows)
            return np.arange(128.0 * start, 128.0 * stop).reshape(-1, 128)

    source = Wide(num_samples)
    cached = CachedDataset(source, tmp_path)
    np.testing.assert_array_equal(cached[:], source[:])
    held = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert held < 1.05 * source[:].nbytes


def test_a_source_may_use_its_buffer_again(tmp_path):
    class Buffered(Rows):
        buffer = np.zeros((8, 50_000), np.float32)

        def __getitem__(self, rows):
            i = np.arange(*rows.indices(self.num_rows))
            self.buffer[: len(i)] = i[:, None]
            return self.buffer[: len(i)]

    stored = CachedDataset(Buffered(64), tmp_path, chunk_size=16)[:]
    np.testing.assert_array_equal(stored[:, 0], np.arange(64))
    assert (stored == stored[:, :1]).all()


def test_invalidate_makes_it_anew(tmp_path):
    source = Rows()
    cached = CachedDataset(source, tmp_path)
    cached.generate()
    count = len(source.calls)
    cached.generate()
    assert len(source.calls) == count
    cached.invalidate()
    assert not Path(cached.directory).exists()
    assert same(cached[:], source[:]) and len(source.calls) > count + 1


# Interruption


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), FloatingPointError("diverged"), MemoryError()]
)
def test_what_was_finished_is_not_made_again(error, tmp_path):
    source = Rows()
    source.fail_at = {15: error}
    cached = CachedDataset(source, tmp_path / "a", chunk_size=10)
    with pytest.raises(type(error)):
        cached.generate()
    source.calls.clear()
    cached.generate()
    assert source.calls == [(15, 20), (20, 22)]
    untouched = CachedDataset(Rows(), tmp_path / "b", chunk_size=10)
    untouched.generate()
    assert contents(cached.directory) == contents(untouched.directory)


def test_full_disk_is_told_and_gone_on_from(tmp_path, monkeypatch):
    source = Rows()
    cached = CachedDataset(source, tmp_path, chunk_size=10)
    write = ZarrStore.write

    def full(store, part, rows):
        if part == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(store, part, rows)

    monkeypatch.setattr(ZarrStore, "write", full)
    with pytest.raises(
        OSError, match="No space left.*finished stay.*again to go on"
    ) as e:
        cached.generate()
    assert e.value.errno == errno.ENOSPC
    monkeypatch.setattr(ZarrStore, "write", write)
    source.calls.clear()
    cached.generate()
    assert source.calls == [(10, 15), (15, 20), (20, 22)]
    assert same(cached[:], source[:])


@pytest.mark.parametrize("when", ["written", "synced"])
def test_the_kernel_says_in_the_middle_of_a_file_that_there_is_no_room(
    when, tmp_path, monkeypatch
):
    source = Rows()
    cached = CachedDataset(source, tmp_path, chunk_size=10)
    write, settle = ZarrStore.write, LocalFiles.settle

    def short_of_room(store, part, rows):
        # The kernel ends any file of this process after so many bytes.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if part == 2 else soft, hard))
        try:
            return write(store, part, rows)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def late(files, names):
        # File systems that reserve no room in advance find out when they are told to.
        if "ledger/00000002.json" in names:
            raise OSError(errno.ENOSPC, "No space left on device")
        settle(files, names)

    with monkeypatch.context() as patched:
        if when == "written":
            patched.setattr(ZarrStore, "write", short_of_room)
        else:
            patched.setattr(LocalFiles, "settle", late)
        with pytest.raises(OSError, match="again to go on"):
            cached.generate()
    assert not [name for name in contents(cached.directory) if name.endswith(".tmp")]
    source.calls.clear()
    cached.generate()
    # Nothing is believed that was written and is not known to be on the disk.
    first = [(0, 5), (5, 10)] if when == "synced" else []
    assert source.calls == [*first, (10, 15), (15, 20), (20, 22)]
    cached.verify(full=True)
    assert same(cached[:], source[:])


def test_the_manifest_comes_when_all_it_names_is_on_the_disk(tmp_path, monkeypatch):
    """A stopped generation, then one that goes on: both leave work to the disk."""
    synced, seen = set(), []
    fsync, replace = os.fsync, os.replace

    def record(descriptor):
        fsync(descriptor)
        synced.add(os.path.realpath(f"/proc/self/fd/{descriptor}"))

    def check(old, new):
        if Path(new).name == "manifest.json":
            seen.append(set(contents(Path(new).parent)) - {Path(old).name})
            missing = {str(Path(new).parent / name) for name in seen[-1]} - synced
            assert {Path(name).name for name in missing} <= {"finishing"}
            folders = {str(Path(name).parent) for name in seen[-1]}
            assert {str(Path(new).parent / name) for name in folders} <= synced
        replace(old, new)

    monkeypatch.setattr(os, "replace", check)
    source = Rows()
    source.fail_at = {15: KeyboardInterrupt()}
    cached = CachedDataset(source, tmp_path, chunk_size=10)
    with pytest.raises(KeyboardInterrupt):
        cached.generate()
    monkeypatch.setattr(os, "fsync", record)
    cached.generate()
    (names,) = seen
    assert {part_of(name) for name in names} == {None, 0, 1, 2, 3, 4}


def test_a_half_written_part_is_written_again(tmp_path):
    source = Rows()
    source.fail_at = {15: KeyboardInterrupt()}
    cached = CachedDataset(source, tmp_path, chunk_size=10)
    with pytest.raises(KeyboardInterrupt):
        cached.generate()
    folder = Path(cached.directory)
    # A torn note, a torn shard, and what a killed writer leaves behind.
    (folder / "ledger/00000000.json").write_bytes(b'{"part": 0')
    shard = folder / "data.zarr/double/c.1.0"
    shard.write_bytes(shard.read_bytes()[:-7])
    (folder / ".manifest.json.77.tmp").write_bytes(b"half")
    (folder / "data.zarr/double/.c.3.0.77.tmp").write_bytes(b"half")
    source.calls.clear()
    cached.generate()
    assert source.calls == [(0, 5), (5, 10), (15, 20), (20, 22)]
    assert same(cached[:], source[:])
    left = [name for name in contents(folder) if "tmp" in name]
    assert not left and not (folder / "ledger").exists()


def test_progress_and_the_time_left_are_shown(tmp_path, capfd):
    CachedDataset(Rows(), tmp_path, chunk_size=10, progress=True).generate()
    shown = capfd.readouterr().err
    assert "22/22" in shown and "samples/s" in shown
    CachedDataset(Rows(), tmp_path / "silent", chunk_size=10).generate()
    assert not capfd.readouterr().err


def test_nothing_but_failures_is_no_cache(tmp_path):
    """In parts so small that each could fail by chance."""
    nan = SimulationDataset(
        lambda u: u * jnp.nan, Normal(0.0, 1.0), 20, on_failure="mask", devices=ONE,
        block_size=4,
    )  # fmt: skip
    cached = CachedDataset(nan, tmp_path, chunk_size=8)
    with pytest.raises(FloatingPointError, match="20 samples that all failed"):
        cached.generate()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["zarr", "tfrecord"])
def test_killed_at_random_it_ends_in_the_same_bytes(format, tmp_path):
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), format, "4", "1"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    killed, whole = report["killed"], report["whole"]
    assert killed["kills"] == 4 and set(killed["digests"]) == {whole}
    # At most the open chunk, of 8 samples, is made again for each kill.
    assert killed["made"] == 60 * killed["generations"] + killed["again"]
    assert killed["again"] <= 8 * killed["kills"]
    # Two writers at once: one makes it, the other waits and finds it made.
    assert report["raced"] == {"codes": [0, 0], "made": 60, "digest": whole}


@pytest.mark.parametrize(
    ("number", "ends"),
    [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_ends_generation_after_the_part_under_way(
    number, ends, tmp_path, caplog
):
    class Signalled(Rows):
        def __getitem__(self, rows):
            found = super().__getitem__(rows)
            if len(self.calls) == 3:
                os.kill(os.getpid(), number)
            return found

    source, handler = Signalled(), signal.getsignal(number)
    # One row tells its form, the second call makes part 0, the third part 1.
    with pytest.raises(ends) as error:
        CachedDataset(source, tmp_path, chunk_size=8).generate()
    assert number == signal.SIGINT or error.value.code == 143
    assert signal.getsignal(number) is handler
    assert "generation ends after this part" in caplog.text
    seen = len(source.calls)
    assert seen == 3
    cached = CachedDataset(source, tmp_path, chunk_size=8)
    assert same(cached[:], Rows()[:])
    # No row is made again but the one that tells the form.
    again = [b - a for a, b in source.calls[seen:]]
    assert sum(again) <= 22 - 8 + 1


def test_a_signal_during_the_last_part_is_obeyed_when_all_is_there(tmp_path):
    class Last(Rows):
        def __getitem__(self, rows):
            found = super().__getitem__(rows)
            if self.calls[-1][1] == len(self) and len(self.calls) > 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return found

    source = Last()
    with pytest.raises(SystemExit):
        CachedDataset(source, tmp_path, chunk_size=8).generate()
    seen = len(source.calls)
    cached = CachedDataset(source, tmp_path, chunk_size=8)
    assert same(cached[:], Rows()[:]) and len(source.calls) <= seen + 1


def test_killed_after_the_manifest_it_is_tidied(tmp_path):
    cached = CachedDataset(Rows(), tmp_path, chunk_size=10)
    cached.generate()
    folder = Path(cached.directory)
    before = contents(folder)
    (folder / "ledger").mkdir()
    (folder / "ledger/00000003.json").write_bytes(b"{}")
    (folder / "finishing").write_bytes(b"")
    CachedDataset(Rows(), tmp_path).generate()
    assert contents(folder) == before and not (folder / "ledger").exists()


def test_writing_overlaps_with_simulating(tmp_path, monkeypatch):
    next_part_began = threading.Event()
    write = ZarrStore.write

    class Watched(Rows):
        def __getitem__(self, rows):
            if rows.start == 10:
                next_part_began.set()
            return super().__getitem__(rows)

    def waits(store, part, rows):
        # Written alone, the next part would never begin.
        assert part != 1 or next_part_began.wait(60)
        return write(store, part, rows)

    monkeypatch.setattr(ZarrStore, "write", waits)
    CachedDataset(Watched(), tmp_path, chunk_size=10).generate()
    assert next_part_began.is_set()


# Damage


@pytest.fixture(scope="module", params=FORMATS)
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    cached = CachedDataset(Rows(), folder, request.param, chunk_size=10)
    cached.generate()
    return cached


def part_of(name):
    if name.startswith("data.zarr") and "/c." in name:
        return int(name.split("/c.")[1].split(".")[0])
    return int(name[5:11]) if name.startswith("part-") else None


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_flipped_byte_anywhere_is_found_and_named(finished, data):
    folder = Path(finished.directory)
    name = data.draw(st.sampled_from(sorted(contents(folder))))
    path = folder / name
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    flip = data.draw(st.integers(1, 255))
    path.write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
    try:
        reopened = CachedDataset(finished.source, folder.parent, finished.format)
        with pytest.raises(CacheDamaged) as error:
            reopened.verify(full=True)
        assert name in str(error.value)
        if part_of(name) is not None:
            assert error.value.parts == [part_of(name)]
            assert f"part {part_of(name)} (rows" in str(error.value)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing"])
def test_sizes_are_compared_on_opening(finished, damage):
    folder = Path(finished.directory)
    names = sorted(n for n in contents(folder) if part_of(n) == 3)
    path = folder / names[0]
    good = path.read_bytes()
    try:
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(good[:-1] if damage == "shorter" else good + b"x")
        reopened = CachedDataset(finished.source, folder.parent, finished.format)
        with pytest.raises(CacheDamaged, match=r"part 3 \(rows 15 to 19\)") as error:
            reopened[0]
        assert error.value.parts == [3]
    finally:
        path.write_bytes(good)


def test_repair_makes_the_damaged_parts_and_no_other(finished):
    folder = Path(finished.directory)
    before = contents(folder)
    for name in before:
        if part_of(name) in (1, 4):
            (folder / name).write_bytes(bytes(len(before[name])))
    source = Rows()
    cached = CachedDataset(source, folder.parent, finished.format)
    source.calls.clear()
    cached.repair()
    assert source.calls == [(5, 10), (20, 22)]
    assert contents(folder) == before
    cached.repair()
    assert len(source.calls) == 2
    if finished.format == "zarr":
        (folder / "data.zarr/bool/zarr.json").write_bytes(b"{}")
        cached.repair()
        assert contents(folder) == before


def test_all_damage_is_named(tmp_path):
    CachedDataset(Rows(), tmp_path, chunk_size=10).generate()
    folder = Path(CachedDataset(Rows(), tmp_path).directory)
    files = [folder / f"data.zarr/single/c.{i}.0.0" for i in (0, 2)]
    files.append(folder / "data.zarr/double/c.2.0")
    for path in files:
        os.truncate(path, 1)
    for act in (lambda c: c.verify(full=True), CachedDataset.verify, lambda c: c[0]):
        with pytest.raises(CacheDamaged) as error:
            act(CachedDataset(Rows(), tmp_path))
        assert error.value.parts == [0, 2]
        for path in files:
            assert path.relative_to(folder).as_posix() in str(error.value)


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_damaged_header_is_repaired(how, finished):
    folder = Path(finished.directory)
    before = contents(folder)
    header = folder / "header.json"
    if how == "missing":
        header.unlink()
    else:
        header.write_bytes(b"x" + before["header.json"][1:])
    CachedDataset(finished.source, folder.parent, finished.format).repair()
    assert contents(folder) == before


def test_killed_while_it_is_deleted_nothing_is_left_that_nobody_takes(
    tmp_path, monkeypatch
):
    cached = CachedDataset(Rows(), tmp_path)
    cached.generate()
    before, remove = contents(cached.directory), shutil.rmtree

    def killed(path, *args, **options):
        for file in sorted(Path(path).glob("*.json")):
            file.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            cached.invalidate()
    assert shutil.rmtree is remove
    CachedDataset(Rows(), tmp_path).generate()
    assert contents(cached.directory) == before
    names = sorted(path.name for path in tmp_path.iterdir())
    folder = Path(cached.directory).name
    assert names == [folder, f"{folder}.lock"]


def test_the_folder_itself_is_brought_to_the_disk(tmp_path, monkeypatch):
    synced, sync = [], _files.sync_folder
    monkeypatch.setattr(
        _files, "sync_folder", lambda path: synced.append(Path(path)) or sync(path)
    )
    CachedDataset(Rows(), tmp_path / "new/deep").generate()
    assert {tmp_path, tmp_path / "new", tmp_path / "new/deep"} <= set(synced)


def test_damage_is_met_when_reading_too(tmp_path):
    """zarr's own checksums, where nobody has verified."""
    cached = CachedDataset(Rows(), tmp_path, chunk_size=44)
    cached.generate()
    path = Path(cached.directory) / "data.zarr/single/c.0.0.0"
    good = path.read_bytes()
    path.write_bytes(good[:20] + bytes([good[20] ^ 1]) + good[21:])
    with pytest.raises(Exception, match=r"(?i)checksum|crc"):
        cached[:]


# Who may write


def test_a_second_writer_is_refused_and_a_dead_one_forgotten(tmp_path):
    cached = CachedDataset(Rows(), tmp_path)
    folder = Path(cached.directory)
    with LocalFiles(folder).locked(0.0):
        for act in (cached.generate, cached.invalidate):
            with pytest.raises(TimeoutError, match=r'no other writer.*"pid": \d+'):
                act()
    # The lock file of a process that is no more.
    folder.with_name(f"{folder.name}.lock").write_text('{"pid": 1, "host": "gone"}')
    cached.generate()
    # Reading needs no lock.
    with LocalFiles(folder).locked(0.0):
        assert len(CachedDataset(Rows(), tmp_path)[:]["bool"]) == 22


def is_open_as(descriptor, stat):
    try:
        return os.path.samestat(os.fstat(descriptor), stat)
    except OSError:
        return False


def test_a_child_that_was_forked_holds_no_lock(tmp_path):
    files = LocalFiles(tmp_path / "cache")
    with files.locked(0.0):
        lock = (tmp_path / "cache.lock").stat()
        (held,) = [fd for fd in range(3, 1024) if is_open_as(fd, lock)]
        # What a fork does to it: the same open file, not closed with the parent's.
        inherited = os.dup(held)
    try:
        with files.locked(0.0):
            pass
    finally:
        os.close(inherited)


def test_a_directory_that_is_no_cache_is_left_alone(tmp_path):
    cached = CachedDataset(Rows(), tmp_path)
    folder = Path(cached.directory)
    folder.mkdir()
    (folder / "thesis.tex").write_text("...")
    for act in (cached.generate, cached.invalidate):
        with pytest.raises(ValueError, match=r"empty or a cache.*thesis\.tex"):
            act()
    assert (folder / "thesis.tex").exists()


@pytest.mark.parametrize("where", ["/proc/cache", "file/cache"])
def test_a_directory_that_cannot_be_written(where, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Expected to write the cache"):
        CachedDataset(Rows(), tmp_path / where).generate()


@pytest.mark.parametrize("name", ["manifest.json", "header.json"])
def test_another_schema_is_refused(name, tmp_path):
    source = Rows()
    cached = CachedDataset(source, tmp_path, chunk_size=10)
    if name == "header.json":
        source.fail_at = {10: KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            cached.generate()
    else:
        cached.generate()
    path = Path(cached.directory) / name
    value = unseal(path.read_bytes())
    (value["layout"] if "layout" in value else value)["schema"] = 99
    path.write_bytes(seal(value))
    reopened = CachedDataset(Rows(), tmp_path)
    with pytest.raises(ValueError, match="schema 3 .*got schema 99.*invalidate"):
        reopened.generate()
    reopened.invalidate()
    reopened.generate()


def test_a_cache_of_another_source_is_refused(tmp_path):
    """Two sources whose hashes share what names the folder."""
    source, other = Rows(), Rows(21)
    other.content_hash = source.content_hash
    source.fail_at = {10: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        CachedDataset(source, tmp_path, chunk_size=10).generate()
    with pytest.raises(ValueError, match="of this source, got one of another"):
        CachedDataset(other, tmp_path).generate()


# Formats as others read them


@pytest.mark.parametrize("rows_each", [1, 4, 64])
def test_a_shard_that_ends_early_is_not_served_from_memory(rows_each, tmp_path):
    class Wide(Rows):
        def __getitem__(self, rows):
            i = np.arange(*rows.indices(self.num_rows)[:2], dtype="f4")
            return {"x": i[:, None] + np.arange(65536 // rows_each / 4, dtype="f4")}

    source = Wide(1024)
    cached = CachedDataset(source, tmp_path, chunk_size=1024)
    cached.generate()
    assert same(cached[0:256], source[0:256])
    shard = next(Path(cached.directory).rglob("c.0.*"))
    index = 16 * -(-512 // rows_each) + 4
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2 - index])
    for _ in range(10):
        with pytest.raises(CacheDamaged, match="part 0"):
            cached[256:512]
        assert same(cached[0:128], source[0:128])


@formats
def test_rows_in_the_other_byte_order_are_stored_as_numbers(format, tmp_path):
    class Other(Rows):
        def __getitem__(self, rows):
            i = np.arange(*rows.indices(self.num_rows)[:2])
            return {"f": (i / 7).astype(">f4"), "i": i.astype(">i4")}

    found = CachedDataset(Other(), tmp_path, format, chunk_size=8)[:]
    np.testing.assert_array_equal(found["i"], np.arange(22))
    np.testing.assert_array_equal(found["f"], (np.arange(22) / 7).astype("f4"))
    assert found["f"].dtype.isnative


def test_rows_that_nobody_can_write_to_are_not_copied():
    mine = np.arange(12.0).reshape(4, 3)
    locked = mine.copy()
    locked.flags.writeable = False
    bound = mine.view()
    bound.flags.writeable = False
    simulated = np.asarray(jnp.ones((4, 3)))
    for x, copied in [
        (mine, True),
        (bound[1:], True),
        (np.frombuffer(bytearray(8), "f8"), True),
        (np.frombuffer(memoryview(bytearray(8)).toreadonly(), "f8"), True),
        # The lock can be lifted.
        (locked[1:3], True),
        (np.frombuffer(bytes(8), "f8"), False),
        (simulated[2:], False),
    ]:
        own = _own(x)
        np.testing.assert_array_equal(own, x)
        assert np.shares_memory(own, x) is not copied


def codecs_of(cached, name):
    array = zarr.open_array(f"{cached.directory}/data.zarr/{name}", mode="r")
    np.testing.assert_array_equal(array[:], Rows()[:][name])
    return [type(codec).__name__ for codec in array.compressors]


@pytest.mark.parametrize("compression", ["lz4", "zstd", None])
def test_zarr_is_compressed_as_asked(compression, tmp_path):
    cached = CachedDataset(Rows(), tmp_path, chunk_size=10, compression=compression)
    assert same(cached[:], Rows()[:]) and same(cached[3:17], Rows()[3:17])
    expected = [] if compression is None else ["BloscCodec"]
    for name in ("double", "single", "integer", "bool"):
        assert codecs_of(cached, name) == [*expected, "Crc32cCodec"]


def test_zarr_is_sharded_and_checked_and_compresses_what_shrinks(finished):
    if finished.format != "zarr":
        return
    array = zarr.open_array(f"{finished.directory}/data.zarr/double", mode="r")
    assert array.metadata.zarr_format == 3
    assert array.shards == (5, 2) and array.shape == (22, 2)
    for name in ("double", "single", "complex"):
        assert codecs_of(finished, name) == ["Crc32cCodec"]
    for name in ("integer", "bool"):
        assert codecs_of(finished, name) == ["BloscCodec", "Crc32cCodec"]


def test_parquet_is_read_by_pyarrow_alone(tmp_path):
    cached = CachedDataset(Rows(), tmp_path, "parquet", chunk_size=44)
    cached.generate()
    table = pyarrow.parquet.read_table(f"{cached.directory}/part-000000.parquet")
    about = json.loads(table.schema.metadata[b"trainax_pk"])
    assert about["single"] == {"shape": [2, 3], "dtype": "float32"}
    values = np.array(table.column("single").to_pylist()).reshape(22, 2, 3)
    np.testing.assert_array_equal(values.astype("f4"), Rows()[:]["single"])


def crc32c_by_hand(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_masked_crc32c_is_that_of_tensorflow():
    # Test vectors of RFC 3720, B.4, and the masking of tensorflow/core/lib/hash/crc32c.h.
    assert crc32c_by_hand(b"123456789") == 0xE3069283
    assert crc32c_by_hand(bytes(32)) == 0x8A9136AA
    for data in (b"123456789", bytes(32), bytes(range(256))):
        crc = crc32c_by_hand(data)
        masked = ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF
        assert masked_crc32c(data) == masked


def fields(message):
    """(number, content) of the length-delimited fields of a protobuf message."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag, length = varint(), varint()
        assert tag & 7 == 2
        yield tag >> 3, message[at : at + length]
        at += length


def examples(content):
    """Records of a TFRecord file, checked, as {name: (kind, raw values)}."""
    at = 0
    while at < len(content):
        length, check = struct.unpack_from("<QI", content, at)
        assert check == masked_crc32c(content[at : at + 8])
        payload = content[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", content, at + 12 + length) == (
            masked_crc32c(payload),
        )
        at += 16 + length
        ((number, features),) = fields(payload)
        assert number == 1
        example = {}
        for number, entry in fields(features):
            assert number == 1
            (_, key), (_, feature) = fields(entry)
            ((kind, values),) = fields(feature)
            ((one, raw),) = fields(values)
            assert one == 1
            example[key.decode()] = kind, raw
        yield example


def test_tfrecord_is_a_sequence_of_examples(tmp_path):
    cached = CachedDataset(Rows(), tmp_path, "tfrecord", chunk_size=44)
    cached.generate()
    content = Path(cached.directory, "part-000000.tfrecord").read_bytes()
    rows = Rows()[:]
    found = list(examples(content))
    assert len(found) == 22
    for i, example in enumerate(found):
        kind, raw = example["single"]
        assert kind == 2  # FloatList
        np.testing.assert_array_equal(
            np.frombuffer(raw, "<f4").reshape(2, 3), rows["single"][i]
        )
        for name, dtype in (("double", "<f8"), ("integer", "<i2"), ("complex", "<c8")):
            kind, raw = example[name]
            assert kind == 1  # BytesList
            np.testing.assert_array_equal(
                np.frombuffer(raw, dtype).reshape(rows[name][i].shape), rows[name][i]
            )


def test_tfrecord_is_read_by_another_library(tmp_path):
    """It parses with Google's protobuf what we have framed and encoded by hand."""
    cached = CachedDataset(Rows(), tmp_path, "tfrecord", chunk_size=44)
    cached.generate()
    path = f"{cached.directory}/part-000000.tfrecord"
    found = list(
        tfrecord.tfrecord_loader(path, None, {"single": "float", "double": "byte"})
    )
    rows = Rows()[:]
    assert len(found) == 22
    for i, example in enumerate(found):
        np.testing.assert_array_equal(example["single"], rows["single"][i].ravel())
        assert bytes(example["double"]) == rows["double"][i].tobytes()


def test_a_remote_store_by_url():
    url = "memory://bucket/caches"
    source = Rows()
    for format in FORMATS:
        cached = CachedDataset(source, url, format, chunk_size=10)
        source.fail_at = {15: KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            cached.generate()
        source.calls.clear()
        assert same(cached[:], Rows()[:])
        assert source.calls == [(15, 20), (20, 22)]
        reopened = CachedDataset(source, url, format)
        reopened.verify(full=True)
        assert reopened.directory.startswith(url)
        reopened.invalidate()
        source.calls.clear()
        reopened[0]
        assert len(source.calls) == 1


# Bad input


def refused_source():
    return SimulationDataset(jnp.sin, Normal(0.0, 1.0), on_the_fly=True)


REFUSED = [
    (lambda d: CachedDataset(np.ones(3), d), "ndarray without `content_hash`"),
    (lambda d: CachedDataset(refused_source(), d), "on_the_fly=True"),
    (lambda d: CachedDataset(Rows(), d, "hdf5"), "zarr, parquet, tfrecord, got 'hdf5'"),
    (lambda d: CachedDataset(Rows(), d, compression="gzip"), "`compression` of zarr"),
    (lambda d: CachedDataset(Rows(), d, chunk_size=0), "`chunk_size`"),
    (lambda d: CachedDataset(Rows(), d, lock_timeout=-1.0), "`lock_timeout`"),
    (lambda d: CachedDataset(Rows(), d, progress=1), "`progress`"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_refused(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_rows_that_are_not_alike_are_refused(tmp_path):
    class Ragged(Rows):
        def __getitem__(self, rows):
            out = super().__getitem__(rows)
            if rows.start == 10:
                out["half"] = out["half"].astype("f4")
            return out

    with pytest.raises(ValueError, match="rows 10 to 14.*must be alike"):
        CachedDataset(Ragged(), tmp_path, chunk_size=10).generate()


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    found = importlib.import_module

    def without(name):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return found(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match=r"pip install 'trainax_pk\[parquet\]'"):
        CachedDataset(Rows(), tmp_path, "parquet").generate()


def test_leaves_have_readable_names_and_no_two_the_same():
    spec = jax.ShapeDtypeStruct((2,), np.float32)
    tree = ({"a b": spec, "a.b": spec}, [spec, spec])
    names = [leaf.name for leaf in make_leaves(tree)]
    assert names == ["params.a.b", "params.a.b.2", "output.0", "output.1"]
    assert [leaf.name for leaf in make_leaves(spec)] == ["data"]
