"""Validation of trajectories and the splits of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainax_pk.data import (
    Split,
    Trajectories,
    as_trajectories,
    split_by_time,
    split_by_trajectory,
)


def numbered(num_samples=7, num_times=20):
    """Every value tells its sample and time: 100 s + t."""
    s, t = np.meshgrid(np.arange(num_samples), np.arange(num_times), indexing="ij")
    value = (100.0 * s + t)[..., None]
    return Trajectories(
        {"u": value, "v": np.stack([value, -value], axis=2)},
        sample={"nu": np.arange(num_samples) + 0.5},
        time=value[..., 0].astype(int),
    )


def test_sizes_and_bytes():
    data = numbered()
    assert (data.num_samples, data.num_times) == (7, 20)
    assert data.nbytes == 8 * (7 * 20 * (1 + 2 + 1) + 7)
    with jax.enable_x64(False):
        assert data.nbytes == 4 * (7 * 20 * (1 + 2 + 1) + 7)


def test_as_trajectories_keeps_trajectories_and_wraps_arrays():
    data = numbered()
    assert as_trajectories(data) is data
    state = jnp.ones((2, 3, 4))
    wrapped = as_trajectories(state)
    assert wrapped.state is state
    assert wrapped.sample is None and wrapped.time is None


def test_memory_maps_stay_on_disk(tmp_path):
    path = tmp_path / "u.npy"
    np.save(path, np.ones((3, 4, 2)))
    data = Trajectories(np.load(path, mmap_mode="r"))
    assert isinstance(data.state, np.memmap)


def test_inputs_may_be_integers_or_flags_and_low_precision_is_floating():
    data = Trajectories(
        jnp.ones((2, 3, 1), jnp.bfloat16),
        sample={"kind": np.array([0, 1], np.uint8), "wet": np.array([True, False])},
        time=np.arange(6).reshape(2, 3),
    )
    assert data.num_times == 3


def test_traced_leaves_are_accepted():
    total = jax.jit(lambda u: Trajectories(u).state.sum())(jnp.full((2, 3, 1), jnp.nan))
    assert jnp.isnan(total)


GOOD = np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"state": None}, "array leaves .* got None without any"),
        ({"state": {}}, "got {} without any"),
        ({"state": 1.0}, "state to be an array .* got float"),
        ({"state": [[1.0, 2.0]]}, r"state\[0\]\[0\] to be an array .* got float"),
        ({"state": np.ones(3)}, r"state to have leading axes .* got shape \(3,\)"),
        ({"state": np.ones((0, 3, 4))}, r"state to hold data.*\(0, 3, 4\)"),
        ({"state": np.ones((2, 3, 0))}, "state to hold data"),
        ({"state": np.ones((2, 3, 4), int)}, "state to be floating, got int64"),
        ({"state": np.ones((2, 3, 4), bool)}, "state to be floating, got bool"),
        ({"state": {"u": 1j * GOOD}}, r"state\['u'\] to be floating, got complex128"),
        (
            {"state": {"a": GOOD, "b": np.ones((2, 5))}},
            r"state\['b'\] .*\(2, 3\).*\(2, 5\)",
        ),
        (
            {"state": {"a": GOOD, "b": np.ones((3, 3))}},
            r"axes \(2, 3\) of state\['a'\]",
        ),
        ({"sample": np.ones(3)}, r"sample .* axes \(2,\) of state, got \(3,\)"),
        (
            {"sample": {"nu": np.float64(1)}},
            r"sample\['nu'\] to be an array.*got float64",
        ),
        (
            {"sample": np.array(1.0)},
            r"sample to have leading axes \(num_samples, ...\)",
        ),
        ({"sample": np.ones(2, complex)}, "sample to be real .* got complex128"),
        ({"sample": np.array(["a", "b"])}, "sample to be real .* got <U1"),
        (
            {"time": (GOOD, np.ones((2, 4)))},
            r"time\[1\] .*\(2, 3\) of state, got \(2, 4\)",
        ),
        ({"time": np.ones(2)}, r"time to have leading axes \(num_samples, num_times"),
        ({"check_finite": 1}, "`check_finite` to be True or False"),
    ],
)
def test_bad_data_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Trajectories(**{"state": GOOD, **kwargs})


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_non_finite_data_are_found(convert, bad, dtype):
    u = np.ones((5, 4, 1, 3), jnp.dtype(dtype))
    u[3, 1, 0, 2] = u[4, 0, 0, 0] = bad
    data = {"fine": convert(np.ones((5, 4, 1))), "u": convert(u)}
    message = rf"got {bad} at index \(3, 1, 0, 2\) of state\['u'\] \(2 such"
    with pytest.raises(ValueError, match=message):
        Trajectories(data)
    assert Trajectories(data, check_finite=False).num_samples == 5
    with pytest.raises(ValueError, match="index .3, 1, 0, 2. of time"):
        Trajectories(convert(np.ones((5, 4, 1))), time=data["u"])


def test_the_last_chunk_of_a_large_array_is_checked(monkeypatch):
    monkeypatch.setattr("trainax_pk.data._trajectories._CHUNK", 7)
    u = np.ones((5, 4, 1))
    Trajectories(u)
    u[4, 3, 0] = np.nan
    with pytest.raises(ValueError, match="index .4, 3, 0. of state"):
        Trajectories(u)


def samples_of(part):
    return sorted(int(x) for x in np.asarray(part.state["u"])[:, 0, 0] // 100)


# Each size compiles a permutation.
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([3, 5, 31]),
    st.integers(0, 100),
    st.sampled_from([np.asarray, jnp.asarray]),
)
def test_split_by_trajectory_shares_nothing(num_samples, seed, convert):
    data = jax.tree.map(convert, numbered(num_samples, 3))
    split = split_by_trajectory(data, (0.34, 0.33, 0.33), key=jax.random.key(seed))
    assert isinstance(split, Split)
    parts = [samples_of(part) for part in split]
    assert sorted(sum(parts, [])) == list(range(num_samples))
    assert all(abs(len(p) - num_samples / 3) <= 1.5 for p in parts)
    for part in split:
        number = np.asarray(part.state["u"])[:, 0, 0] // 100
        np.testing.assert_array_equal(part.sample["nu"], number + 0.5)
        np.testing.assert_array_equal(part.time, np.asarray(part.state["u"])[..., 0])


def test_split_by_trajectory_is_keyed_and_takes_counts():
    data = numbered(40, 3)
    one, same, other = (
        split_by_trajectory(data, (20, 5, 3), key=jax.random.key(k)) for k in (0, 0, 1)
    )
    assert [part.num_samples for part in one] == [20, 5, 3]
    assert samples_of(one.train) == samples_of(same.train) != samples_of(other.train)
    assert len(set(sum((samples_of(part) for part in one), []))) == 28
    assert samples_of(one.test) != [25, 26, 27]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_split_by_time_keeps_the_guard(data):
    counts = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    guard = data.draw(st.integers(0, 4))
    rest = data.draw(st.integers(0, 3))
    whole = numbered(3, sum(counts) + 2 * guard + rest)
    split = split_by_time(whole, counts, guard=guard)
    at = 0
    for part, count in zip(split, counts, strict=True):
        times = np.arange(at, at + count)
        np.testing.assert_array_equal(part.state["u"][1, :, 0], 100 + times)
        np.testing.assert_array_equal(part.state["v"][2, :, 1, 0], -200 - times)
        np.testing.assert_array_equal(part.time[0], times)
        assert part.sample["nu"] is whole.sample["nu"]
        at += count + guard


def test_split_by_time_takes_fractions_of_what_the_guards_leave():
    split = split_by_time(numbered(2, 110), (0.5, 0.3, 0.2), guard=5)
    assert [part.num_times for part in split] == [50, 30, 20]
    assert np.shares_memory(split.test.state["u"], split.test.state["u"].base)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((0.8, 0.2), "three positive fractions"),
        ((0.8, 0.2, 0.0), "three positive fractions"),
        ((5, 2, 0.5), "three positive fractions"),
        ((5, 2, True), "three positive fractions"),
        ((0.6, -0.2, 0.6), "three positive fractions"),
        ((float("nan"), 0.5, 0.5), "three positive fractions"),
        (0.8, "three positive fractions .* got 0.8"),
        ((0.8, 0.1, 0.01), "fractions with the sum 1"),
        ((0.98, 0.01, 0.01), r"leave no part empty, got \(20, 0, 0\)"),
        ((10, 10, 1), r"sum of at most 20 .*sum 21"),
    ],
)
def test_bad_parts_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        split_by_trajectory(numbered(20, 3), parts, key=jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        split_by_time(numbered(3, 24), parts, guard=2)


def test_bad_guards_are_refused():
    with pytest.raises(ValueError, match="`guard` to be an integer >= 0, got -1"):
        split_by_time(numbered(), guard=-1)
    with pytest.raises(ValueError, match="guards of 9 times, .* of 20 .* at most 8"):
        split_by_time(numbered(), guard=9)
    assert split_by_time(numbered(), (2, 1, 1), guard=8).test.num_times == 1
