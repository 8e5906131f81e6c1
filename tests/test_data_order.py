"""The order of training data: permutations, chunking, long runs, statistics."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.special import gammaincc

from trainax_pk.data import SequentialOrder, ShuffledOrder
from trainax_pk.data._feistel import num_rounds, permute, split_domain

LARGEST = 2**31 - 1


# Few sizes, since each compiles; among them one item, odd domains and full batches.
SIZES = [(1, 1), (3, 2), (7, 7), (40, 9)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 2**31), st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(size, seed, cycle):
    num_items, batch_size = size
    # N steps begin and end on a boundary of epochs and hold B of them.
    steps = ShuffledOrder(num_items, batch_size, seed).indices(
        cycle * num_items, num_items
    )
    assert steps.dtype == jnp.int32 and steps.shape == (num_items, batch_size)
    epochs = np.sort(np.asarray(steps).reshape(batch_size, num_items), axis=1)
    np.testing.assert_array_equal(epochs, [np.arange(num_items)] * batch_size)


@pytest.mark.parametrize("num_items", [63, 64, 123_457])
def test_larger_epochs_are_permutations(num_items):
    flat = np.asarray(ShuffledOrder(num_items, num_items, 3).indices(5, 1))[0]
    np.testing.assert_array_equal(np.sort(flat), np.arange(num_items))
    assert np.count_nonzero(flat == np.arange(num_items)) < 12  # Poisson of mean 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([(1, 3), (2, 2), (1, 1, 2), (3, 1)]))
def test_any_chunking_gives_the_same_order(start, chunks):
    order = ShuffledOrder(7, 3, 11)
    starts = start + np.cumsum((0, *chunks[:-1]))
    parts = [order.indices(s, n) for s, n in zip(starts, chunks, strict=True)]
    np.testing.assert_array_equal(order.indices(start, 4), np.concatenate(parts))


@pytest.mark.parametrize("make", [ShuffledOrder, lambda n, b, s: SequentialOrder(n, b)])
def test_start_step_may_be_traced_and_traces_once(make):
    order, traces = make(13, 5, 2), []

    @eqx.filter_jit
    def chunk(order, start):
        traces.append(None)
        return order.indices(start, 4)

    for start in (0, 1, 7, 2**31 - 10):
        got = chunk(order, jnp.asarray(start, jnp.int32))
        np.testing.assert_array_equal(got, order.indices(start, 4))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("num_items", "batch_size"),
    [(7, 3), (10_007, 32), (2**20, 2**20), (LARGEST, 1021), (LARGEST - 1, 5)],
)
@pytest.mark.parametrize("start", [0, 12_345_678, 2**31 - 3, 2**32 - 2])
def test_positions_are_exact_in_long_runs(num_items, batch_size, start):
    batch_size = min(batch_size, 2**12)
    got = np.asarray(SequentialOrder(num_items, batch_size).indices(start, 2))
    expected = [
        [((start + i) * batch_size + j) % num_items for j in range(batch_size)]
        for i in range(2)
    ]
    np.testing.assert_array_equal(got, expected)


def test_epochs_advance_in_long_runs():
    # 2³² global positions lie behind this step: the epoch, too, must be exact.
    order, step = ShuffledOrder(7, 3, 5), 2**31 - 2
    flat = np.asarray(order.indices(step, 15)).reshape(-1)
    skip = -(step * 3) % 7
    for e in range(5):
        part = flat[skip + 7 * e : skip + 7 * (e + 1)]
        np.testing.assert_array_equal(np.sort(part), np.arange(7))
    epoch = jnp.full((7,), (step * 3 + skip) // 7, jnp.uint32)
    words = jnp.array([0, 5], jnp.uint32)
    direct = permute(jnp.arange(7, dtype=jnp.uint32), epoch, words, 7)
    np.testing.assert_array_equal(flat[skip : skip + 7], direct)


def test_epochs_and_seeds_differ():
    def epoch(seed, step):
        return np.asarray(ShuffledOrder(50, 50, seed).indices(step, 1))[0]

    seen = {tuple(epoch(seed, step)) for seed in range(4) for step in range(4)}
    assert len(seen) == 16


def test_the_high_word_of_a_seed_counts():
    low, high = (
        ShuffledOrder(50, 50, jnp.array(words, jnp.uint32)).indices(0, 1)
        for words in ((0, 1), (1, 1))
    )
    assert (low != high).any()


def test_typed_and_legacy_keys_and_seeds_agree():
    orders = [
        ShuffledOrder(20, 4, key)
        for key in (9, jax.random.key(9), jax.random.PRNGKey(9))
    ]
    first, *others = [order.indices(3, 6) for order in orders]
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_another_random_number_implementation_has_a_longer_key():
    order = ShuffledOrder(20, 20, jax.random.key(9, impl="rbg"))
    np.testing.assert_array_equal(np.sort(order.indices(0, 1)[0]), np.arange(20))


def test_the_order_does_not_depend_on_x64():
    order = ShuffledOrder(1009, 16, jax.random.key(1))
    here = order.indices(70, 9)
    with jax.enable_x64(False):
        np.testing.assert_array_equal(here, order.indices(70, 9))


def test_the_order_is_pinned():
    # A resumed run relies on it: a change here breaks every checkpoint.
    assert ShuffledOrder(1000, 4, 42).indices(10**6, 2).tolist() == [
        [278, 106, 119, 892],
        [293, 981, 26, 624],
    ]


@pytest.mark.parametrize("typed", [True, False])
def test_vmaps_over_seeds(typed):
    make = jax.random.key if typed else jax.random.PRNGKey
    keys = jax.vmap(make)(jnp.arange(3))
    orders = eqx.filter_vmap(lambda key: ShuffledOrder(13, 4, key))(keys)
    got = eqx.filter_vmap(lambda order: order.indices(5, 6))(orders)
    for i in range(3):
        np.testing.assert_array_equal(got[i], ShuffledOrder(13, 4, i).indices(5, 6))


def p_value(x, num_values, excluded=()):
    """Pearson's chi-square test of a uniform distribution of integers."""
    counts = np.delete(np.bincount(x, minlength=num_values), excluded)
    expected = x.size / counts.size
    chi = ((counts - expected) ** 2 / expected).sum()
    return gammaincc((counts.size - 1) / 2, chi / 2)


@pytest.mark.parametrize("num_items", [3, 5, 7, 13, 30, 64, 101])
def test_shuffles_pass_chi_square_tests(num_items):
    # About 40 tests in all: a sound shuffle fails one of them with odds of 1 in 250.
    # With 8 rounds, N = 5 to 7 fail at p < 1e-100.
    least = 1e-4
    x = np.asarray(ShuffledOrder(num_items, num_items, 4).indices(0, 20_000))
    for position in (0, num_items // 2, num_items - 1):
        assert p_value(x[:, position], num_items) > least
    diagonal = np.arange(num_items) * (num_items + 1)
    for first, second in ((0, 1), (1, num_items - 1)):
        pairs = x[:, first] * num_items + x[:, second]
        assert p_value(pairs, num_items**2, diagonal) > least
    # One position in two consecutive epochs. Overlapping pairs would not be independent.
    pairs = x[::2, 0] * num_items + x[1::2, 0]
    assert p_value(pairs, num_items**2) > least


def test_all_permutations_of_four_are_equally_likely():
    x = np.asarray(ShuffledOrder(4, 4, 8).indices(0, 24_000))
    _, code = np.unique(x, axis=0, return_inverse=True)
    assert code.max() == 23
    assert p_value(code.ravel(), 24) > 1e-4


def test_neighbours_of_a_large_epoch_are_uncorrelated():
    x = np.asarray(ShuffledOrder(10_000, 10_000, 1).indices(0, 20)).astype(float)
    y = np.asarray(ShuffledOrder(10_000, 10_000, 2).indices(0, 20)).astype(float)
    # Standard deviation of a correlation of 200,000 pairs: 0.0022.
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x, y)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.012


@settings(max_examples=60, deadline=None)
@given(st.integers(1, LARGEST))
def test_the_domain_is_nearly_square_and_its_last_row_not_empty(num_items):
    a, b = split_domain(num_items)
    assert (b - 1) * a < num_items <= a * b
    assert abs(a - b) <= 1 and max(a, b) < 2**16
    assert b >= 2 or num_items <= 2
    assert num_rounds(num_items) >= 8


def test_memory_is_that_of_the_indices():
    order = ShuffledOrder(LARGEST, 64, 0)
    compiled = eqx.filter_jit(lambda o, s: o.indices(s, 100)).lower(order, 0).compile()
    memory = compiled.compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 20 * 100 * 64 * 4


@pytest.mark.parametrize("make", [SequentialOrder, lambda n, b: ShuffledOrder(n, b, 0)])
def test_sizes_are_checked(make):
    with pytest.raises(ValueError, match="batch_size=6 and num_items=5.*at most 5"):
        make(5, 6)
    with pytest.raises(ValueError, match="`num_items` to be an integer >= 1, got 0"):
        make(0, 1)
    with pytest.raises(ValueError, match="`batch_size` to be an integer >= 1, got -2"):
        make(5, -2)
    with pytest.raises(ValueError, match="`batch_size`.*got 2.0"):
        make(5, 2.0)
    with pytest.raises(ValueError, match="at most 2147483647 items, got 2147483648"):
        make(2**31, 1)


def test_arguments_of_indices_are_checked():
    order = SequentialOrder(5, 2)
    with pytest.raises(ValueError, match="`start_step` to be an integer >= 0, got -1"):
        order.indices(-1, 2)
    with pytest.raises(ValueError, match="`n` to be an integer >= 1, got 0"):
        order.indices(0, 0)
    with pytest.raises(ValueError, match="start_step \\+ n <= 2\\*\\*32"):
        order.indices(2**32 - 1, 2)


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (None, "None"),
        (True, "True"),
        (-1, "-1"),
        (1.5, "1.5"),
        (np.zeros(2), "float64\\[2\\]"),
        (jax.random.split(jax.random.key(0), 3), "key<fry>\\[3\\]"),
        (jax.random.split(jax.random.PRNGKey(0), 3), "uint32\\[3, 2\\]"),
    ],
)
def test_keys_are_checked(bad, got):
    with pytest.raises(ValueError, match=f"`seed_or_key`.*got {got}"):
        ShuffledOrder(5, 2, bad)


def test_the_order_is_not_fused_into_what_reads_it():
    # Without the barrier XLA repeats the permutation for every entry of a window.
    order = ShuffledOrder(50, 4, jax.random.key(0))
    text = jax.jit(lambda step: order.indices(step, 2)).lower(0).as_text()
    assert "optimization_barrier" in text
