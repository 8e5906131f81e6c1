"""Lorenz-63 and Lorenz-96 assimilation windows: truths of one long run, observed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import trainax_pk as tx

NUM_TIMES = 200
EDGE = 10
INTERIOR = slice(EDGE, NUM_TIMES - EDGE)
NOISE_VARIANCE = 2.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        title: Name in tables.
        stepper: True model, `u -> u_next`.
        num_dofs: Size D of the state.
        every: Steps between observations.
        components: Observed components of Lorenz-63; None: a random half at each time.
        num_train: Training windows.
        num_test: Test windows.
        target: Mean squared error of the published learned solver, whole window.
    """

    title: str
    stepper: Callable[[jax.Array], jax.Array]
    num_dofs: int
    every: int
    components: tuple[int, ...] | None
    num_train: int
    num_test: int
    target: float


CASES = {
    "l63_all": Case(
        "Lorenz-63, all components", tx.sample_data.make_lorenz_63_stepper(0.01),
        3, 8, (0, 1, 2), 10_000, 2_000, 1.34,
    ),
    "l63_first": Case(
        "Lorenz-63, first component", tx.sample_data.make_lorenz_63_stepper(0.01),
        3, 8, (0,), 10_000, 2_000, 1.34,
    ),
    "l96": Case(
        "Lorenz-96, 20 of 40", tx.sample_data.make_lorenz_96_stepper(40, dt=0.05),
        40, 4, None, 2_000, 256, 0.38,
    ),
}  # fmt: skip


class Windows(NamedTuple):
    """Windows `(N, T, D)`; `observed` is 0 where the mask is False."""

    truth: jax.Array
    observed: jax.Array
    mask: jax.Array


@functools.cache
def windows(name: str) -> tuple[Windows, Windows]:
    """Training and test windows of a case, the same at every call."""
    case = CASES[name]
    total = case.num_train + case.num_test
    run = _long_run(case.stepper, case.num_dofs, total * NUM_TIMES)
    truth = run.reshape(total, NUM_TIMES, case.num_dofs)
    data = _observed(case, truth, jax.random.key(63 if "63" in name else 96))
    train = Windows(*(x[: case.num_train] for x in data))
    test = Windows(*(x[case.num_train :] for x in data))
    return train, test


def observed_anew(name: str, offsets: tuple[int, ...], key: jax.Array) -> Windows:
    """The training run cut at other places, with other masks and noise.

    Windows that begin at `offsets` after those of `windows`.
    """
    truth = windows(name)[0].truth
    run = truth.reshape(-1, truth.shape[2])
    parts = []
    for offset in offsets:
        rest = run[offset:]
        count = rest.shape[0] // NUM_TIMES
        parts.append(rest[: count * NUM_TIMES].reshape(count, NUM_TIMES, -1))
    return _observed(CASES[name], jnp.concatenate(parts), key)


def shortened(data: Windows, num_times: int) -> Windows:
    """Windows cut into pieces whose edges are not observed either.

    Of as many times as a multiple of those between observations, which therefore keep
    their places; what is left over at the end is not used.
    """
    if num_times == NUM_TIMES:
        return data
    pieces = NUM_TIMES // num_times
    inner = np.zeros((num_times, 1), bool)
    inner[EDGE : num_times - EDGE] = True
    truth, observed, mask = (
        x[:, : pieces * num_times].reshape(-1, num_times, x.shape[2]) for x in data
    )
    return Windows(truth, jnp.where(inner, observed, 0.0), mask & inner)


def _observed(case: Case, truth: jax.Array, key: jax.Array) -> Windows:
    mask_key, noise_key = jax.random.split(key)
    mask = observation_mask(case, mask_key, truth.shape[0])
    noise = jax.random.normal(noise_key, truth.shape) * NOISE_VARIANCE**0.5
    return Windows(truth, jnp.where(mask, truth + noise, 0.0), mask)


def observation_mask(case: Case, key: jax.Array, num_windows: int) -> jax.Array:
    """Where a window is observed: every few steps between its unobserved edges."""
    times = np.zeros(NUM_TIMES, bool)
    times[EDGE : NUM_TIMES - EDGE : case.every] = True
    shape = (num_windows, NUM_TIMES, case.num_dofs)
    if case.components is not None:
        seen = np.isin(np.arange(case.num_dofs), case.components)
        return jnp.broadcast_to(times[:, None] & seen, shape)
    # The half of a random permutation: exactly as many at each time.
    rank = jnp.argsort(jax.random.uniform(key, shape), axis=-1)
    return (rank < case.num_dofs // 2) & times[:, None]


@eqx.filter_jit
def _long_run(stepper: Callable, num_dofs: int, num_times: int) -> jax.Array:
    start = 8.0 + jax.random.normal(jax.random.key(0), (num_dofs,))
    start, _ = jax.lax.scan(lambda u, _: (stepper(u), None), start, length=5_000)
    return jax.lax.scan(lambda u, _: (stepper(u), u), start, length=num_times)[1]


def errors(estimate: jax.Array, truth: jax.Array) -> tuple[float, float]:
    """Mean squared error over all windows and components: whole window, interior."""
    squared = np.square(np.asarray(estimate, np.float64) - np.asarray(truth))
    return float(squared.mean()), float(squared[:, INTERIOR].mean())
