"""Streaming: the batches of data in memory, bit by bit, in little memory."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trainax_pk as tx
from trainax_pk.checkpoint import Segment
from trainax_pk.data import (
    CacheDamaged,
    CachedDataset,
    Samples,
    ShuffledOrder,
    StoredWindows,
    Windows,
)
from trainax_pk.data import _zarr_store as zarr_store
from trainax_pk.data._cache_gather import PieceCache
from trainax_pk.engine import HostFeed, StreamFeed

DRIVER = Path(__file__).parent / "_stream_driver.py"
FORMATS = ["zarr", "parquet", "tfrecord"]
NUM_ROWS, NUM_TIMES = 23, 13


class Tracks:
    """Trajectories of two leaves with parameters, from a formula."""

    num_times = NUM_TIMES
    is_parametric = True

    def __init__(self, num_rows=NUM_ROWS):
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, rows):
        i = np.arange(*rows.indices(self.num_rows), dtype=float)
        steps = i[:, None] + np.arange(NUM_TIMES) / 100
        u = steps[..., None] * np.array([1.0, -2.0, np.pi])
        return {"a": i.astype("f4")}, {"u": u, "q": np.sqrt(steps).astype("f4")}

    def with_split(self, split):
        return self

    def content_hash(self):
        return f"tracks-{self.num_rows}" + 40 * "0"


class Pairs(Tracks):
    """The same without times."""

    num_times = None

    def content_hash(self):
        return f"pairs-{self.num_rows}" + 40 * "0"


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """Pieces of a few rows, and of a few times of one row."""
    size = zarr_store._PIECE_BYTES
    zarr_store._PIECE_BYTES = 110
    yield
    zarr_store._PIECE_BYTES = size


@pytest.fixture(scope="module", params=FORMATS)
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return CachedDataset(
        Tracks(), folder, request.param, chunk_size=16, memory_budget=2**16
    )


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zarr")
    return CachedDataset(Tracks(), folder, chunk_size=16, memory_budget=2**16)


def windows_of(cached, steps=3, **options):
    return StoredWindows(cached, lambda trajectories: steps, **options)


# The same batches


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, NUM_TIMES - 1), st.integers(1, 4), st.booleans(), st.integers(0, 99)
)
def test_windows_are_those_of_data_in_memory(stored, steps, stride, only_initial, seed):
    options = {"stride": stride, "only_initial": only_initial}
    memory = Windows(stored.trajectories(), steps, residency="host", **options)
    disk = windows_of(stored, steps, **options)
    assert len(disk) == len(memory) and disk.item_bytes == memory.item_bytes
    indices = np.random.default_rng(seed).integers(0, len(disk), 40)
    same(disk.gather_host(indices), memory.gather_host(indices))


def test_samples_are_those_of_data_in_memory(tmp_path):
    for format in FORMATS:
        pairs = CachedDataset(Pairs(), tmp_path, format, chunk_size=16)
        memory, disk = Samples(pairs[:], residency="host"), windows_of(pairs)
        indices = np.array([22, 0, 7, 8, 7])
        same(disk.gather_host(indices), memory.gather_host(indices))
        same(disk[-3:], memory[-3:])


def test_the_store_is_cut_along_rows_and_times_and_zarr_reads_it(cached):
    store = cached.open()
    shapes = {leaf.name: store.piece_shape(leaf) for leaf in store.layout.leaves}
    # 4, 24 and 4 bytes a time: 13 times of q fit twice, those of u in four parts.
    assert shapes == {"params.a": (8, 1), "output.q": (2, 13), "output.u": (1, 4)}
    whole = dict(zip(shapes, jax.tree.leaves(cached[:]), strict=True))
    for name, expected in whole.items():
        array = zarr.open_array(f"{cached.directory}/data.zarr/{name}", mode="r")
        np.testing.assert_array_equal(array[:], expected)
        np.testing.assert_array_equal(array[7:18:3], expected[7:18:3])


def feeds(cached, batch_size=6, num_updates=10_000, seed=3):
    memory = Windows(cached.trajectories(), 3, residency="host")
    order = ShuffledOrder(len(memory), batch_size, seed)
    return order, HostFeed(memory), StreamFeed(windows_of(cached), num_updates)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 3000),
    st.lists(st.sampled_from([1, 4, 9]), min_size=1, max_size=9),
    st.data(),
)
def test_any_chunking_from_any_step_gives_the_same_batches(cached, start, counts, data):
    order, memory, disk = feeds(cached)
    for count in counts:
        if data.draw(st.booleans()):
            # A callback looks at the batch that comes next.
            same(disk.load(order, start, 1, 1), memory.load(order, start, 1, 1))
        got, expected = (f.load(order, start, count, 9) for f in (disk, memory))
        assert {x.shape[0] for x in jax.tree.leaves(got)} == {9}
        same(*(jax.tree.map(lambda x, n=count: x[:n], b) for b in (got, expected)))
        start += count


def test_a_run_may_be_repeated_and_another_order_may_follow(cached):
    order, memory, disk = feeds(cached)
    other = ShuffledOrder(order.num_items, 6, 4)
    for which, start in ((order, 0), (order, 9), (other, 9), (order, 0), (order, 700)):
        same(disk.load(which, start, 9, 9), memory.load(which, start, 9, 9))


def test_threads_share_the_callers_precision(cached):
    order, memory, disk = feeds(cached)
    for x64 in (False, True):
        with jax.enable_x64(x64):
            for start in (0, 9, 18):
                got = disk.load(order, start, 9, 9)
                same(got, memory.load(order, start, 9, 9))
                assert got.state["u"].dtype == (jnp.float64 if x64 else jnp.float32)
        order = ShuffledOrder(order.num_items, 6, 5)


# What is read


def test_a_group_reads_each_piece_once(cached, monkeypatch):
    cached.generate()
    # Its own store: threads of other tests may still read ahead from theirs.
    order, _, disk = feeds(CachedDataset(cached.source, cached.cache_dir))
    own = disk.windows._cached.open()
    read, reads = type(own).read_piece, []

    def counted(store, leaf, row, entry):
        if store is own:
            reads.append((leaf.name, row, entry))
        return read(store, leaf, row, entry)

    monkeypatch.setattr(type(own), "read_piece", counted)
    indices = np.asarray(order.indices(0, 40)).reshape(-1)
    disk.windows.gather_host(indices)
    rows, times = indices // 10, indices[:, None] % 10 + np.arange(4)
    pieces = {("a", r // 8, 0) for r in rows} | {("q", r // 2, 0) for r in rows}
    pieces |= {("u", r, t // 4) for r, ts in zip(rows, times, strict=True) for t in ts}
    assert len(reads) == len(pieces)
    assert {(name[-1], row, entry) for name, row, entry in reads} == pieces


def test_pieces_that_were_used_last_are_kept(cached):
    store = cached.open()
    leaf = store.layout.leaves[0]
    size = store.read_piece(leaf, 0, 0).nbytes
    pieces = PieceCache(store, 2 * size)
    first, second = pieces.fetch(leaf, 0, 0), pieces.fetch(leaf, 1, 0)
    assert pieces.fetch(leaf, 0, 0) is first
    pieces.fetch(leaf, 2, 0)
    assert pieces.fetch(leaf, 0, 0) is first
    assert pieces.fetch(leaf, 1, 0) is not second
    assert PieceCache(store, 0).fetch(leaf, 0, 0) is not first


def test_reading_goes_on_while_a_chunk_is_computed(cached, monkeypatch):
    order, _, disk = feeds(cached)
    gather, began, caller = StoredWindows.gather_host, [], threading.get_ident()
    beyond = threading.Event()

    def watched(windows, indices):
        if windows is disk.windows:
            began.append(threading.get_ident())
        if len(began) == 3:
            beyond.set()
        return gather(windows, indices)

    monkeypatch.setattr(StoredWindows, "gather_host", watched)
    disk.load(order, 0, 5, 5)
    # Nobody asks for the third group: of 5, 10 and 20 updates.
    assert beyond.wait(60) and caller not in began


def test_nothing_is_read_beyond_the_end(cached, monkeypatch):
    order, memory, disk = feeds(cached, num_updates=12)
    gather, counts = StoredWindows.gather_host, []

    def counted(windows, indices):
        if windows is disk.windows:
            counts.append(len(indices))
        return gather(windows, indices)

    monkeypatch.setattr(StoredWindows, "gather_host", counted)
    for start, count in ((0, 5), (5, 5), (10, 2)):
        got, expected = (f.load(order, start, count, 5) for f in (disk, memory))
        same(*(jax.tree.map(lambda x, n=count: x[:n], b) for b in (got, expected)))
    assert sum(counts) == 12 * 6


# Trained on


class Net(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, u):
        out = self.mlp(jnp.append(u["u"], u["q"]))
        return {"u": out[:3], "q": out[3].astype(u["q"].dtype)}


NET = Net(eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0)))


def train(data, steps=120, **options):
    trainer = tx.trainer.SupervisedTrainer(
        data, num_rollout_steps=2, optimizer=optax.adam(1e-2), num_training_steps=steps,
        batch_size=6, progress=False, **options,
    )  # fmt: skip
    return trainer, trainer(NET, key=jax.random.key(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Tracks that condition nothing, for a model of the state alone."""
    source = Tracks()
    source.is_parametric = False
    folder = tmp_path_factory.mktemp("plain")
    return CachedDataset(source, folder, chunk_size=16, memory_budget=2**14)


def test_a_trainer_streams_what_exceeds_the_budget(plain):
    assert 2 * plain.nbytes > 2**14
    look = tx.callback.Function(lambda step, model, batch: batch.state, 50, "look")
    trainers, histories = {}, {}
    for residency in ("auto", "host", "device"):
        trainer, (_, history) = train(plain, residency=residency, callbacks=[look])
        trainers[residency], histories[residency] = trainer, history
    assert trainers["auto"].windows.residency == "disk"
    expected = histories["host"]
    for history in histories.values():
        same(history.records["look"].values, expected.records["look"].values)
    same(histories["auto"].loss, expected.loss)
    # On the device the program gathers too: another program, other last bits.
    np.testing.assert_allclose(histories["device"].loss, expected.loss, rtol=1e-6)
    assert float(history.loss[-1]) < float(history.loss[0])


def test_a_stopped_run_goes_on_with_the_batches_that_were_next(plain, tmp_path):
    trainer, (_, whole) = train(plain, residency="disk", program="loop")
    run = {"key": jax.random.key(1), "run_dir": tmp_path}
    _, stopped = trainer(NET, segment=Segment(epochs=1), **run)
    _, resumed = trainer(NET, **run)
    assert 0 < len(stopped.loss) < len(whole.loss) == 120
    same(resumed.loss, whole.loss)


def test_a_larger_budget_trains_in_memory(plain):
    generous = CachedDataset(plain.source, plain.cache_dir, memory_budget=2**20)
    assert train(generous, 1)[0].windows.residency == "device"
    unlimited = CachedDataset(plain.source, plain.cache_dir)
    assert train(unlimited, 1)[0].windows.residency == "device"


@pytest.mark.slow
def test_peak_memory_stays_within_the_budget(tmp_path):
    budget = 3 * 2**24
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), str(budget)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["residency"] == "disk" and report["nbytes"] > 9.9 * budget
    assert report["generation"] < budget, report
    assert report["training"] < budget, report
    assert report["loss"][1] < report["loss"][0]


# Damage, and what is refused


def test_damage_is_met_and_named(tmp_path):
    cached = CachedDataset(Tracks(), tmp_path, chunk_size=16)
    cached.generate()
    path = Path(cached.directory) / "data.zarr/output.u/c.1.0.0"
    good = path.read_bytes()
    order = ShuffledOrder(len(windows_of(cached)), 6, 0)
    for at in (30, -10):
        bad = bytearray(good)
        bad[at] ^= 1
        path.write_bytes(bad)
        feed = StreamFeed(windows_of(CachedDataset(Tracks(), tmp_path)), 100)
        with pytest.raises(CacheDamaged, match=r"part 1 \(rows 8 to 15\)") as error:
            for start in range(0, 60, 20):
                feed.load(order, start, 20, 20)
        assert error.value.parts == [1]


def test_a_remote_store_is_streamed():
    cached = CachedDataset(Tracks(), "memory://streamed", chunk_size=16)
    memory = Windows(cached.trajectories(), 2, residency="host")
    indices = np.arange(0, len(memory), 7)
    same(windows_of(cached, 2).gather_host(indices), memory.gather_host(indices))


def test_refused(plain):
    state = np.ones((4, 5, 2))
    held_out = tx.configuration.Supervised()
    keys = jax.random.split(jax.random.key(0), 2)
    models = eqx.filter_vmap(lambda k: eqx.nn.Linear(2, 2, key=k))(keys)
    pairs = CachedDataset(Pairs(), plain.cache_dir)
    small = CachedDataset(plain.source, plain.cache_dir, memory_budget=2000)
    trainer, _ = train(plain, 1)
    for act, message in (
        (lambda: train(state, residency="disk"), "a CachedDataset to stream"),
        (lambda: train(small), "budget of at least 32 batches of"),
        (lambda: windows_of(plain, 13), "windows of at most 13 times"),
        (lambda: windows_of(pairs, stride=2), "window_stride=1 for samples"),
        (lambda: trainer(models, key=keys, ensemble=True), "one run at a time"),
        (lambda: tx.callback.Validation(held_out, plain, every=1), "fit into memory"),
        (lambda: CachedDataset(Tracks(), "x", memory_budget=0), "`memory_budget`"),
    ):
        with pytest.raises(ValueError, match=message):
            act()
