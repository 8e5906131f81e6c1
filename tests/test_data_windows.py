"""Windows against NumPy loops and against trainax's stacked windows."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainax
from hypothesis import given, settings
from hypothesis import strategies as st

from trainax_pk import Window
from trainax_pk.data import Trajectories, WindowLayout, Windows


def example(num_samples=3, num_times=9, seed=0):
    rng = np.random.default_rng(seed)
    return Trajectories(
        {
            "u": rng.standard_normal((num_samples, num_times, 2, 5)),
            "q": rng.standard_normal((num_samples, num_times)),
        },
        sample=(rng.standard_normal((num_samples, 4)), np.arange(num_samples) + 7),
        time=rng.integers(0, 99, (num_samples, num_times, 3)),
    )


def by_loop(data, length, stride=1, state_length=None):
    """Every window, sample by sample and start by start."""
    windows = [
        Window(
            jax.tree.map(lambda x: x[s, t : t + (state_length or length)], data.state),
            jax.tree.map(lambda x: x[s], data.sample),
            jax.tree.map(lambda x: x[s, t : t + length], data.time),
        )
        for s in range(data.num_samples)
        for t in range(0, data.num_times - length + 1, stride)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *windows)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(x, y)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 4),
    st.booleans(),
    st.data(),
)
def test_all_windows_equal_a_loop(num_samples, num_times, stride, only_initial, draw):
    steps = draw.draw(st.integers(0, num_times - 1))
    data = example(num_samples, num_times)
    expected = by_loop(data, steps + 1, stride, 1 if only_initial else None)
    for residency in ("device", "host"):
        windows = Windows(
            data, steps, stride=stride, only_initial=only_initial, residency=residency
        )
        assert len(windows) == expected.batch_size
        assert_same(windows[:], expected)


@pytest.mark.parametrize("only_initial", [True, False])
def test_the_order_is_that_of_trainax(only_initial):
    state = np.random.default_rng(1).standard_normal((4, 11, 2, 6))
    stacked = trainax.TrajectorySubStacker(
        jnp.asarray(state), 4, only_store_ic=only_initial
    )
    windows = Windows(state, 3, only_initial=only_initial)
    assert len(windows) == stacked.num_total_samples
    indices = jnp.array([31, 0, 8, 7, 8])
    batch = windows[indices]
    np.testing.assert_array_equal(batch.state, stacked(indices))
    assert batch.sample is None and batch.time is None


def test_host_batches_are_those_of_the_device_bit_for_bit():
    data, indices = example(5, 12), np.array([3, 44, 0, 17, 17, 9])
    for x64 in (True, False):
        with jax.enable_x64(x64):
            host = Windows(data, 3, residency="host")
            device = Windows(data, 3, residency="device")
            a = host.gather_host(indices)
            b = device.gather(device.arrays, indices)
            assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(a))
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(b))
            assert_same(a, b)
            assert_same(host[indices], device[indices])


def test_host_windows_read_memory_maps(tmp_path):
    path = tmp_path / "u.npy"
    state = np.random.default_rng(2).standard_normal((3, 6, 2))
    np.save(path, state)
    windows = Windows(np.load(path, mmap_mode="r"), 1, residency="host")
    assert windows.arrays.state.base is not None  # a view of the map
    np.testing.assert_array_equal(windows[6].state[0], state[1, 1:3])


def test_indices_are_read_as_numpy_reads_them():
    windows = Windows(example(), 2)
    n = len(windows)
    every = windows[:]
    assert_same(windows[-1], windows[n - 1])
    assert_same(windows[np.uint8(3)], windows[3])
    assert_same(windows[[-n, 4]], windows[np.array([0, 4], np.uint8)])
    assert_same(windows[5:0:-2], windows[[5, 3, 1]])
    assert windows[n:].batch_size == 0
    assert_same(jax.tree.map(lambda *x: jnp.concatenate(x), *windows), every)
    for bad in (n, -n - 1, [0, n]):
        with pytest.raises(IndexError, match=f"indices in .{-n}, {n}., got"):
            windows[bad]
    for bad in (1.0, [True, False], [[0]], None):
        with pytest.raises(TypeError, match="an integer, a slice or a 1D array"):
            windows[bad]


def test_gathers_in_jit_vmap_and_scan_with_the_layout_static():
    windows = Windows(example(), 2)
    indices = jnp.array([[0, 20, 3], [11, 4, 4]], jnp.int32)
    one_by_one = [windows.gather(windows.arrays, i) for i in indices]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)

    assert hash(windows.layout) == hash(Windows(example(seed=3), 2).layout)
    gather = jax.jit(WindowLayout.gather, static_argnums=0)
    assert_same(gather(windows.layout, windows.arrays, indices[0]), one_by_one[0])
    # Refused by jit if it were a method of the module, whose hash covers the arrays.
    assert_same(jax.jit(windows.gather)(windows.arrays, indices[0]), one_by_one[0])
    assert_same(
        jax.vmap(windows.gather, in_axes=(None, 0))(windows.arrays, indices), expected
    )
    scan = jax.jit(
        lambda arrays, indices: jax.lax.scan(
            lambda _, i: (None, windows.gather(arrays, i)), None, indices
        )[1]
    )
    assert_same(scan(windows.arrays, indices), expected)
    # Data of several seeds, each with its own batch.
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), windows.arrays)
    got = jax.vmap(windows.gather)(two, indices)
    assert_same(jax.tree.map(lambda x: x[0], got), one_by_one[0])
    doubled = jax.tree.map(lambda x: 2 * x, one_by_one[1])
    assert_same(jax.tree.map(lambda x: x[1], got), doubled)


def test_gather_captures_no_array():
    windows = Windows(example(), 2)
    closed = jax.make_jaxpr(windows.gather)(windows.arrays, jnp.arange(4))
    assert sum(np.size(c) for c in closed.consts) == 0


def test_windows_are_a_pytree_of_their_arrays():
    windows = Windows(example(), 2)
    assert len(jax.tree.leaves(windows)) == 5
    traces = []

    @eqx.filter_jit
    def mean(windows, indices):
        traces.append(None)
        return windows.gather(windows.arrays, indices).state["u"].mean()

    for seed in (0, 1):
        other = Windows(example(seed=seed), 2)
        got = mean(other, jnp.array([5, 2]))
        np.testing.assert_allclose(got, other[[5, 2]].state["u"].mean(), rtol=1e-12)
    assert len(traces) == 1


def test_gathering_holds_the_raw_data_and_one_batch():
    state = np.zeros((20, 101, 1, 40))
    windows = Windows(state, 20)
    indices = jnp.zeros((50, 16), jnp.int32)

    def chunk(arrays, indices):
        def step(total, i):
            batch = windows.gather(arrays, i).state
            # A product of times keeps the batch from fusing into the sum.
            return total + jnp.einsum("blcx,bmcx->lm", batch, batch), None

        return jax.lax.scan(step, jnp.zeros((21, 21)), indices)[0]

    memory = jax.jit(chunk).lower(windows.arrays, indices).compile().memory_analysis()
    raw, batch = state.nbytes, 16 * 21 * 40 * 8
    assert memory.argument_size_in_bytes <= raw + indices.nbytes + 64
    assert memory.temp_size_in_bytes < 3 * batch + 2 * 21 * 21 * 8 + 4096 < raw


def test_samples_may_be_sharded():
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("s",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("s"))
    data = example(4)
    sharded = Windows(jax.tree.map(lambda x: jax.device_put(x, sharding), data), 2)
    assert sharded.arrays.state["u"].sharding == sharding
    indices = [0, 27, 13]
    assert_same(sharded[indices], Windows(data, 2)[indices])


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        (None, "device"),
        ({}, "device"),
        ({"bytes_limit": 2 * 960}, "device"),
        ({"bytes_limit": 2 * 960 - 1}, "host"),
    ],
)
def test_auto_residency_keeps_half_of_the_device_free(monkeypatch, stats, expected):
    class Device:
        def memory_stats(self):
            return stats

    state = np.zeros((3, 10, 4))
    assert state.nbytes == 960
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: [Device()])
        windows = Windows(state, 1)
    assert windows.residency == expected
    assert isinstance(windows.arrays.state, np.ndarray) == (expected == "host")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_rollout_steps": -1}, "`num_rollout_steps` to be an integer >= 0"),
        ({"num_rollout_steps": 9}, "at most 9 times.*got 10.*num_rollout_steps <= 8"),
        ({"stride": 0}, "`stride` to be an integer >= 1, got 0"),
        ({"only_initial": 1}, "`only_initial` to be True or False"),
        ({"residency": "gpu"}, "'auto', 'device' or 'host', got 'gpu'"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Windows(example(), **{"num_rollout_steps": 1, **kwargs})


def test_more_windows_than_int32_counts_are_refused():
    state = np.lib.stride_tricks.as_strided(np.ones(1), (2**16, 2**16), (0, 0))
    data = Trajectories(state, check_finite=False)
    with pytest.raises(ValueError, match="at most 2147483647 windows, got 4294967296"):
        Windows(data, 0, residency="host")
    assert len(Windows(data, 0, stride=4, residency="host")) == 2**30


def test_device_windows_do_not_gather_on_the_host():
    with pytest.raises(ValueError, match="residency 'host', got 'device'"):
        Windows(example(), 1).gather_host([0])
