"""One table of configurations; every contract test runs on every row."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx
from trainax_pk.configuration import at_step

C = tx.configuration
THETA = jnp.array([0.7, -0.4, 0.3])
KEY = jax.random.key(11)
WEIGHTS = jnp.array([0.3, 1.7, 0.8, 1.1, 0.45])
stop = jax.lax.stop_gradient

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.2, 0.6, shape))


WINDOWS = _data(3, 6, 2, 4)


def _step(theta, u):
    """A nonlinear stencil without symmetry."""
    return theta[0] * u + theta[1] * jnp.roll(u, 1, -1) + theta[2] * u**2


class Model(eqx.Module):
    theta: jax.Array

    def __call__(self, u):
        return _step(self.theta, u)


REF = Model(jnp.array([0.9, 0.2, -0.15]))


def _mse(p, t):
    return jnp.mean((p - t) ** 2)


def _mean(values):
    return sum(values) / len(values)


# Models that take or return more than a state, with theta as what is trained.


def _conditioned(theta):
    return tx.Stepper(
        lambda u, inputs: _step(theta, u) * inputs.sample + inputs.time,
        conditioned=True,
    )


def _stochastic(theta):
    return tx.Stepper(
        lambda u, key: (
            _step(theta, u) + theta[0] / 9 * jax.random.normal(key, u.shape, u.dtype)
        ),
        stochastic=True,
    )


def _bundled(theta):
    return tx.Stepper(
        lambda u: jnp.stack([_step(theta, u), jnp.sin(_step(theta, u) + u)]), bundle=2
    )


def _tree(theta):
    def step(u):
        return {
            "a": _step(theta, u["a"]) + u["b"][0],
            "b": u["b"] * theta[0] + jnp.mean(u["a"]),
        }

    return step


class Normed(eqx.Module):
    theta: jax.Array
    norm: eqx.nn.BatchNorm

    def __call__(self, u, state):
        u, state = self.norm(_step(self.theta, u), state)
        return jnp.tanh(u), state


NORM, NORM_STATE = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
    2, "batch", momentum=0.8, mode="batch", dtype=jnp.float64
)


def _normed(theta):
    return tx.Stepper(Normed(theta, NORM), NORM_STATE)


# Oracles: plain Python over time and samples, written from the formulas.


def _supervised_oracle(weights, every=None, start=0):
    def oracle(theta, batch, key):
        total = 0.0
        for t in range(1, len(weights) + 1):
            losses = []
            for sample in batch:
                u = sample[start]
                for s in range(1, t + 1):
                    u = _step(theta, u)
                    if every and s % every == 0 and s < t:
                        u = stop(u)
                losses.append(_mse(u, sample[start + t]))
            total += weights[t - 1] * _mean(losses)
        return total

    return oracle


def _conditioned_oracle(theta, batch, key):
    total = 0.0
    for b in range(3):
        u = batch.state[b, 0]
        for t in range(3):
            u = _step(theta, u) * batch.sample[b] + batch.time[b, t]
            total += WEIGHTS[t] * _mse(u, batch.state[b, t + 1]) / 3
    return total


def _stochastic_oracle(theta, batch, key):
    total = 0.0
    for b in range(3):
        u = batch[b, 0]
        for t in range(3):
            k = jax.random.split(jax.random.fold_in(key, t), 3)[b]
            u = _step(theta, u) + theta[0] / 9 * jax.random.normal(k, u.shape)
            total += WEIGHTS[t] * _mse(u, batch[b, t + 1]) / 3
    return total


def _bundled_oracle(theta, batch, key):
    total = 0.0
    for sample in batch:
        u, out = sample[0], []
        for _ in range(2):
            first = _step(theta, u)
            out += [first, jnp.sin(first + u)]
            u = out[-1]
        for t in range(4):
            total += WEIGHTS[t] * _mse(out[t], sample[t + 1]) / len(batch)
    return total


def _tree_oracle(theta, batch, key):
    total = 0.0
    for b in range(3):
        a, c = batch["a"][b, 0], batch["b"][b, 0]
        for t in range(2):
            a, c = _step(theta, a) + c[0], c * theta[0] + jnp.mean(a)
            wrong = jnp.concatenate(
                [(a - batch["a"][b, t + 1]).ravel(), c - batch["b"][b, t + 1]]
            )
            total += WEIGHTS[t] * jnp.mean(wrong**2) / 3
    return total


def _normalise(u):
    mean = jnp.mean(u, axis=(0, 2), keepdims=True)
    return mean, jnp.mean((u - mean) ** 2, axis=(0, 2), keepdims=True)


def _normed_oracle(theta, batch, key):
    u, total = batch[:, 0], 0.0
    for t in range(3):
        u = jnp.stack([_step(theta, x) for x in u])
        mean, var = _normalise(u)
        u = jnp.tanh((u - mean) / jnp.sqrt(var + 1e-5))
        total += WEIGHTS[t] * jnp.mean((u - batch[:, t + 1]) ** 2)
    return total


def _diverted_oracle(steps, length, *, every=None, cut_div=False):
    branch_weights = jnp.array([0.6, 1.4, 0.2, 1.9])

    def oracle(theta, batch, key):
        total = 0.0
        for sample in batch:
            main = sample[0]
            for t in range(steps - length + 1):
                pred, ref = main, stop(main) if cut_div else main
                for b in range(length):
                    pred, ref = _step(theta, pred), _step(REF.theta, ref)
                    weight = WEIGHTS[t] * branch_weights[b]
                    total += weight * _mse(pred, ref) / len(batch)
                    if every and (t + b + 1) % every == 0:
                        pred = stop(pred)
                main = _step(theta, main)
                if every and (t + 1) % every == 0:
                    main = stop(main)
        return total

    return oracle


def _mix_oracle(theta, batch, key):
    total = 0.0
    for sample in batch:
        u = sample[0]
        for t in range(4):
            u = _step(theta if t < 3 else REF.theta, u)
            total += WEIGHTS[t] * _mse(u, sample[t + 1]) / len(batch)
            u = stop(u) if t + 1 == 2 else u
    return total


def _residuum(u_next, u_prev):
    return u_next**2 - 1.3 * jnp.roll(u_prev, 1, -1) + 0.2


def _forced_residuum(u_next, u_prev, inputs):
    return _residuum(u_next, u_prev) * inputs.sample - inputs.time


def _residuum_oracle(theta, batch, key):
    total = 0.0
    for sample in batch:
        u = sample[0]
        for t in range(3):
            u_next = _step(theta, u)
            wrong = _residuum(u_next, stop(u))
            total += WEIGHTS[t] * jnp.mean(jnp.abs(wrong)) / len(batch)
            u = u_next
    return total


def _forced_residuum_oracle(theta, batch, key):
    total = 0.0
    for b in range(3):
        u = batch.state[b, 0]
        for t in range(3):
            u_next = _step(theta, u) * batch.sample[b] + batch.time[b, t]
            wrong = _residuum(u_next, u) * batch.sample[b] - batch.time[b, t]
            total += WEIGHTS[t] * jnp.mean(wrong**2) / 3
            u = u_next
    return total


def _noise_oracle(theta, batch, key):
    noise_key = jax.random.split(jax.random.split(key)[0], 1)[0]
    noise = jax.random.normal(noise_key, (3, 2, 4))
    noisy = batch[:, 0] + jnp.array([[0.3], [0.1]])[None] * noise
    return _supervised_oracle(WEIGHTS[:2])(theta, batch.at[:, 0].set(noisy), key)


def _push_oracle(theta, batch, key):
    pushed = jnp.stack(
        [_step(stop(theta), _step(stop(theta), sample[0])) for sample in batch]
    )
    later = batch[:, 2:].at[:, 0].set(pushed)
    return _supervised_oracle(WEIGHTS[:2])(theta, later, key)


def _composite_oracle(theta, batch, key):
    return 0.4 * _supervised_oracle(WEIGHTS[:2])(
        theta, batch, key
    ) - 1.5 * _diverted_oracle(3, 2)(theta, batch, key)


def _worst_oracle(theta, batch, key):
    return jnp.max(
        jnp.stack([_mse(_step(theta, s[0]), s[1]) + _mse(s[1], s[0]) for s in batch])
    )


FORCED = tx.Window(WINDOWS, 1 + _data(3, seed=4) / 5, _data(3, 6, 2, 1, seed=5))
TREES = {"a": WINDOWS, "b": _data(3, 6, 3, seed=6)}
BRANCH = jnp.array([0.6, 1.4, 0.2, 1.9])


@dataclass
class Row:
    """A configuration, a model as a function of theta, a batch, and the formula."""

    configuration: C.AbstractConfiguration
    oracle: Callable[..., Any]
    model: Callable[..., Any] = Model
    batch: Any = field(default_factory=lambda: WINDOWS)
    cut: bool = False  # Finite differences do not see a stopped gradient.


def _weighted(count):
    return {"time_level_weights": WEIGHTS[:count]}


ROWS = {
    "supervised": Row(C.Supervised(3, **_weighted(3)), _supervised_oracle(WEIGHTS[:3])),
    "supervised, cut": Row(
        C.Supervised(5, cut_bptt=True, cut_bptt_every=2, **_weighted(5)),
        _supervised_oracle(WEIGHTS, every=2),
        cut=True,
    ),
    "supervised, conditioned": Row(
        C.Supervised(3, **_weighted(3)), _conditioned_oracle, _conditioned, FORCED
    ),
    "supervised, stochastic": Row(
        C.Supervised(3, **_weighted(3)), _stochastic_oracle, _stochastic
    ),
    "supervised, bundled": Row(
        C.Supervised(4, **_weighted(4)), _bundled_oracle, _bundled
    ),
    "supervised, tree": Row(
        C.Supervised(2, **_weighted(2)), _tree_oracle, _tree, TREES
    ),
    "supervised, batch norm": Row(
        C.Supervised(3, **_weighted(3)), _normed_oracle, _normed
    ),
    "supervised, loss of the batch": Row(
        C.Supervised(
            1,
            time_level_loss=tx.loss.BatchLoss(
                lambda p, t: jnp.max(
                    jax.vmap(_mse)(p, t)
                    + jax.vmap(_mse)(t, WINDOWS[:, 0].astype(t.dtype))
                )
            ),
        ),
        _worst_oracle,
    ),
    "curriculum": Row(
        at_step(
            C.Curriculum(C.Supervised(5, **_weighted(5)), lambda i: i // 10),
            jnp.array(30),
        ),
        _supervised_oracle(WEIGHTS[:3]),
    ),
    "diverted, one": Row(
        C.DivertedChainBranchOne(3, ref_stepper=REF, **_weighted(3)),
        lambda *args: _diverted_oracle(3, 1)(*args) / 0.6,
    ),
    "diverted": Row(
        C.DivertedChain(
            4,
            3,
            ref_stepper=REF,
            branch_level_weights=BRANCH[:3],
            **_weighted(4),
        ),
        _diverted_oracle(4, 3),
    ),
    "diverted, cut": Row(
        C.DivertedChain(
            4,
            2,
            ref_stepper=REF,
            branch_level_weights=BRANCH[:2],
            cut_bptt=True,
            cut_bptt_every=2,
            cut_div_chain=True,
            **_weighted(4),
        ),
        _diverted_oracle(4, 2, every=2, cut_div=True),
        cut=True,
    ),
    "mix": Row(
        C.MixChainPostPhysics(
            3, 1, ref_stepper=REF, cut_bptt=True, cut_bptt_every=2, **_weighted(4)
        ),
        _mix_oracle,
        cut=True,
    ),
    "residuum": Row(
        C.Residuum(
            3,
            residuum_fn=_residuum,
            time_level_loss=tx.loss.mae,
            cut_prev=True,
            **_weighted(3),
        ),
        _residuum_oracle,
        cut=True,
    ),
    "residuum, conditioned": Row(
        C.Residuum(
            3,
            residuum_fn=tx.Stepper(_forced_residuum, conditioned=True),
            **_weighted(3),
        ),
        _forced_residuum_oracle,
        _conditioned,
        FORCED,
    ),
    "input noise": Row(
        C.InputNoise(C.Supervised(2, **_weighted(2)), std=jnp.array([[0.3], [0.1]])),
        _noise_oracle,
    ),
    "pushforward": Row(
        C.Pushforward(C.Supervised(2, **_weighted(2)), 2), _push_oracle, cut=True
    ),
    "composite": Row(
        C.Composite(
            [
                C.Supervised(2, **_weighted(2)),
                C.DivertedChain(
                    3,
                    2,
                    ref_stepper=REF,
                    branch_level_weights=BRANCH[:2],
                    **_weighted(3),
                ),
            ],
            [0.4, -1.5],
        ),
        _composite_oracle,
    ),
}
rows = pytest.mark.parametrize("name", ROWS)


def _loss(row):
    return lambda theta, batch, key: row.configuration(row.model(theta), batch, key=key)


@functools.cache
def _compiled(name):
    return _jit(jax.value_and_grad(_loss(ROWS[name]), has_aux=True))


@rows
def test_loss_and_gradient_are_those_of_the_formula(name):
    row = ROWS[name]
    (loss, aux), grad = _compiled(name)(THETA, row.batch, KEY)
    assert loss.shape == () and loss.dtype == jnp.float64
    expected = row.oracle(THETA, row.batch, KEY)
    assert abs(expected) > 1e-6
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    grad_u = jax.grad(row.oracle)(THETA, row.batch, KEY)
    np.testing.assert_allclose(grad, grad_u, rtol=1e-11, atol=1e-12)
    if not isinstance(row.configuration, C.Composite):
        weights = getattr(row.configuration, "configuration", row.configuration)
        weights = weights.time_level_weights[: len(aux.time_losses)]
        np.testing.assert_allclose(weights @ aux.time_losses, loss, rtol=1e-13)


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if not row.cut])
def test_gradient_is_a_finite_difference(name):
    row = ROWS[name]
    direction = jnp.array([0.4, -1.0, 0.7])
    compiled = _compiled(name)

    def along(eps):
        return compiled(THETA + eps * direction, row.batch, KEY)[0][0]

    numeric = (8 * (along(1e-4) - along(-1e-4)) - along(2e-4) + along(-2e-4)) / 12e-4
    grad = compiled(THETA, row.batch, KEY)[1]
    np.testing.assert_allclose(grad @ direction, numeric, rtol=1e-8)


@rows
def test_vmap_over_models(name):
    row = ROWS[name]
    thetas = jnp.stack([THETA, 0.5 * THETA, THETA[::-1]])
    together = _jit(jax.vmap(lambda t: _loss(row)(t, row.batch, KEY)[0]))(thetas)
    alone = [_compiled(name)(t, row.batch, KEY)[0][0] for t in thetas]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-12)


@pytest.mark.parametrize("name", ["supervised, conditioned", "diverted", "composite"])
def test_without_jit(name):
    row = ROWS[name]
    loss, _ = _loss(row)(THETA, row.batch, KEY)
    expected = _compiled(name)(THETA, row.batch, KEY)[0][0]
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def _single(tree):
    return jax.tree.map(
        lambda x: x.astype("f4") if eqx.is_inexact_array(x) else x, tree
    )


# The layer of one row is in double precision itself.
@pytest.mark.parametrize("name", [n for n in ROWS if "batch norm" not in n])
def test_single_precision_is_kept(name):
    row = ROWS[name]
    configuration = row.configuration
    if name not in ("input noise",):  # Its std may have any precision.
        configuration = _single_reference(configuration)

    def loss(theta):
        return configuration(row.model(theta), _single(row.batch), key=KEY)[0]

    value, grad = jax.eval_shape(jax.value_and_grad(loss), THETA.astype("f4"))
    assert value.dtype == grad.dtype == jnp.float32


def _single_reference(configuration):
    """The reference stepper in single precision; weights stay in double."""
    single = Model(REF.theta.astype("f4"))
    return jax.tree.map(
        lambda x: single if isinstance(x, Model) else x,
        configuration,
        is_leaf=lambda x: isinstance(x, Model),
    )


@rows
def test_one_trace_for_all_values(name):
    row, traces = ROWS[name], []

    def loss(theta, batch, key):
        traces.append(None)
        return _loss(row)(theta, batch, key)[0]

    jitted = _jit(loss)
    for i in range(3):
        batch = jax.tree.map(lambda x: x * (1 + i), row.batch)  # noqa: B023
        jitted((1 + i) * THETA, batch, jax.random.key(i))
    assert len(traces) == 1


def _batch_of(batch, length):
    if isinstance(batch, tx.Window):
        return tx.Window(
            _batch_of(batch.state, length), batch.sample, _batch_of(batch.time, length)
        )
    return jax.tree.map(lambda x: x[:, :length], batch)


@rows
def test_windows_may_be_longer_but_not_shorter(name):
    row = ROWS[name]
    num_times = row.configuration.num_times
    loss = _loss(row)
    conditioned = isinstance(row.batch, tx.Window)
    least = max(num_times, 3 if conditioned else 1)
    exact = _jit(loss)(THETA, _batch_of(row.batch, least), KEY)[0]
    np.testing.assert_allclose(
        exact, _compiled(name)(THETA, row.batch, KEY)[0][0], rtol=1e-13
    )
    if least > 1:
        with pytest.raises(ValueError, match="Expected .*(windows|forcing)"):
            loss(THETA, _batch_of(row.batch, least - 1), KEY)


@rows
def test_numpy_batches_are_taken(name):
    row = ROWS[name]
    batch = jax.tree.map(np.asarray, row.batch)
    shape = jax.eval_shape(lambda t: _loss(row)(t, batch, KEY)[0], THETA)
    assert shape.shape == ()


@pytest.mark.parametrize(
    ("name", "adjoint"),
    [
        ("supervised, stochastic", tx.RecursiveCheckpointAdjoint()),
        ("supervised, tree", tx.KStepAdjoint(9)),
        ("supervised, batch norm", tx.RecursiveCheckpointAdjoint()),
        ("diverted", tx.RecursiveCheckpointAdjoint()),
        ("mix", tx.KStepAdjoint(9)),
        ("residuum, conditioned", tx.RecursiveCheckpointAdjoint()),
        ("composite", tx.RecursiveCheckpointAdjoint()),
    ],
)
def test_other_adjoints_give_the_same_numbers(name, adjoint):
    row = ROWS[name]
    configuration = jax.tree.map(
        lambda x: adjoint if isinstance(x, tx.DirectAdjoint) else x,
        row.configuration,
        is_leaf=lambda x: isinstance(x, tx.DirectAdjoint),
    )
    changed = Row(configuration, row.oracle, row.model, row.batch)
    compiled = _jit(jax.value_and_grad(_loss(changed), has_aux=True))
    (loss, _), grad = compiled(THETA, row.batch, KEY)
    (expected, _), expected_grad = _compiled(name)(THETA, row.batch, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-11)


@pytest.mark.parametrize("name", ["supervised, tree", "supervised, batch norm"])
def test_truncated_gradients_inside_a_configuration(name):
    """The state's trees, absent layers and layers' states are carried through cuts."""
    row = ROWS[name]
    steps = row.configuration.num_rollout_steps
    both = []
    for options in (
        {"adjoint": tx.OneStepAdjoint()},
        {"cut_bptt": True},
    ):
        configuration = C.Supervised(steps, **_weighted(steps), **options)
        changed = Row(configuration, row.oracle, row.model, row.batch)
        compiled = _jit(jax.value_and_grad(_loss(changed), has_aux=True))
        both.append(compiled(THETA, row.batch, KEY))
    for a, b in zip(jax.tree.leaves(both[0]), jax.tree.leaves(both[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_batch_norm_statistics_are_those_of_the_chain():
    row = ROWS["supervised, batch norm"]
    (_, aux), _ = _compiled("supervised, batch norm")(THETA, row.batch, KEY)
    u, mean_r, var_r = WINDOWS[:, 0], 0.0, 1.0
    for _ in range(3):
        u = jnp.stack([_step(THETA, x) for x in u])
        mean, var = _normalise(u)
        u = jnp.tanh((u - mean) / jnp.sqrt(var + 1e-5))
        mean_r = 0.8 * mean_r + 0.2 * mean
        var_r = 0.8 * var_r + 0.2 * var
    found = aux.model_state.get(NORM.batch_state_index)
    np.testing.assert_allclose(found[0], mean_r[0, :, 0], rtol=1e-12)
    np.testing.assert_allclose(found[1], var_r[0, :, 0], rtol=1e-12)
    assert aux.model_state.get(NORM.batch_counter) == 3


# Special cases equal general ones, in loss and gradient.


def _assert_same(a, b, batch_a=WINDOWS, batch_b=WINDOWS, model_a=Model, model_b=Model):
    results = []
    for configuration, model, batch in ((a, model_a, batch_a), (b, model_b, batch_b)):
        row = Row(configuration, None, model)
        (loss, _), grad = _jit(jax.value_and_grad(_loss(row), has_aux=True))(
            THETA, batch, KEY
        )
        results.append((loss, grad))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-12)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-11, atol=1e-13)
    assert jnp.max(jnp.abs(results[0][1])) > 1e-6


def _reference_windows(length):
    states = [WINDOWS[:, 0]]
    for _ in range(length):
        states.append(jax.vmap(REF)(states[-1]))
    return jnp.stack(states, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"cut_bptt": True}, {"cut_bptt": True, "cut_bptt_every": 2}],
)
@pytest.mark.parametrize("cut_div_chain", [False, True])
def test_a_branch_as_long_as_the_rollout_is_supervised(options, cut_div_chain):
    diverted = C.DivertedChain(
        4,
        4,
        ref_stepper=REF,
        branch_level_weights=WEIGHTS[:4],
        cut_div_chain=cut_div_chain,
        **options,
    )
    supervised = C.Supervised(4, **_weighted(4), **options)
    _assert_same(diverted, supervised, WINDOWS, _reference_windows(4))


@pytest.mark.parametrize("options", [{}, {"cut_bptt": True, "cut_div_chain": True}])
def test_branches_of_one_step(options):
    options = options | {"ref_stepper": REF} | _weighted(4)
    _assert_same(
        C.DivertedChainBranchOne(4, **options), C.DivertedChain(4, 1, **options)
    )


def test_branches_of_one_step_are_a_residuum():
    _assert_same(
        C.DivertedChainBranchOne(3, ref_stepper=REF, **_weighted(3)),
        C.Residuum(3, residuum_fn=lambda n, p: n - REF(p), **_weighted(3)),
    )


@pytest.mark.parametrize("length", [2, 5])
def test_a_curriculum_at_a_length_is_the_shorter_configuration(length):
    def at(configuration):
        curriculum = C.Curriculum(configuration, lambda step: step - 100)
        return at_step(curriculum, jnp.array(100 + length))

    cut = {"cut_bptt": True, "cut_bptt_every": 2}
    _assert_same(
        at(C.Supervised(5, **_weighted(5), **cut)),
        C.Supervised(length, **_weighted(length), **cut),
    )
    _assert_same(
        at(C.Residuum(5, residuum_fn=_residuum, **_weighted(5))),
        C.Residuum(length, residuum_fn=_residuum, **_weighted(length)),
    )
    branches = {"ref_stepper": REF, "branch_level_weights": BRANCH[:2]}
    _assert_same(
        at(C.DivertedChain(5, 2, **_weighted(5), **branches)),
        C.DivertedChain(length, 2, **_weighted(length), **branches),
    )


@pytest.mark.parametrize(
    "adjoint", [tx.RecursiveCheckpointAdjoint(), tx.KStepAdjoint(2)]
)
def test_a_curriculum_under_other_adjoints(adjoint):
    curriculum = C.Curriculum(
        C.Supervised(5, adjoint=adjoint, **_weighted(5)), lambda step: 3
    )
    _assert_same(
        at_step(curriculum, 0), C.Supervised(3, adjoint=adjoint, **_weighted(3))
    )


def test_a_curriculum_cuts_a_bundle():
    curriculum = C.Curriculum(C.Supervised(4, **_weighted(4)), lambda step: 3)
    weights = WEIGHTS[:4].at[3].set(0.0)
    _assert_same(
        at_step(curriculum, 0),
        C.Supervised(4, time_level_weights=weights),
        model_a=_bundled,
        model_b=_bundled,
    )


def test_a_curriculum_is_clipped_and_full_when_called_directly():
    curriculum = C.Curriculum(C.Supervised(3, **_weighted(3)), lambda step: step - 5.0)
    _assert_same(at_step(curriculum, jnp.array(0)), C.Supervised(1, **_weighted(1)))
    _assert_same(at_step(curriculum, jnp.array(99)), C.Supervised(3, **_weighted(3)))
    _assert_same(curriculum, C.Supervised(3, **_weighted(3)))


def test_curricula_are_found_inside_other_configurations():
    inner = C.Curriculum(C.Supervised(3, **_weighted(3)), lambda step: 1 + step)
    other = C.Residuum(2, residuum_fn=_residuum)
    outer = C.Composite([C.Pushforward(inner, 2), other], [0.5, 2.0])
    short = C.Supervised(2, **_weighted(2))
    expected = C.Composite([C.Pushforward(short, 2), other], [0.5, 2.0])
    _assert_same(at_step(outer, jnp.array(1)), expected)


def test_a_traced_horizon_never_leaves_nothing():
    chain = functools.partial(C.DivertedChain, 4, 3, ref_stepper=lambda u: 0.5 * u)
    bundled = tx.Stepper(lambda u: jnp.stack([0.3 * u, 0.2 * u]), bundle=2)
    pairs = (
        (3, lambda h: chain(horizon=h), lambda u: 0.3 * u),
        (1, lambda h: C.Supervised(4, horizon=h, **_weighted(4)), bundled),
    )
    for shortest, make, model in pairs:
        loss = _jit(lambda h, make=make, model=model: make(h)(model, WINDOWS)[0])
        expected = make(jnp.array(shortest))(model, WINDOWS)[0]
        assert expected > 0
        for horizon in (0, shortest - 1, -5):
            np.testing.assert_allclose(loss(horizon), expected, rtol=1e-12)
        assert loss(4) > expected


def test_a_schedule_of_nan_is_no_length():
    schedule = lambda step: jnp.where(step == 3, jnp.nan, 1.0)  # noqa: E731
    curriculum = C.Curriculum(C.Supervised(3, **_weighted(3)), schedule)
    loss = _jit(lambda i: at_step(curriculum, i)(lambda u: 0.3 * u, WINDOWS)[0])
    assert jnp.isnan(loss(3)) and loss(2) > 0


def test_losses_of_branches_hold_branch_weights_and_no_time_weights():
    v = jnp.array([0.7, 1.9])
    chain = C.DivertedChain(
        3,
        2,
        ref_stepper=lambda u: 2 * u,
        branch_level_weights=v,
        time_level_weights=jnp.array([0.4, 1.3, 5.0]),
    )
    loss, aux = chain(lambda u: 3 * u, jnp.ones((1, 1, 1)))
    # Branches from 1 and from 3: (3 - 2)² and (9 - 4)² times the square of the start.
    branches = (v[0] * 1 + v[1] * 25) * jnp.array([1.0, 9.0])
    np.testing.assert_allclose(aux.time_losses, branches, rtol=1e-12)
    np.testing.assert_allclose(loss, 0.4 * branches[0] + 1.3 * branches[1], rtol=1e-12)


def test_a_curriculum_is_one_program_that_skips():
    traces = []

    def model(u):
        traces.append(None)
        return _step(THETA, u)

    curriculum = C.Curriculum(C.Supervised(5), lambda step: step)
    loss = _jit(lambda step: at_step(curriculum, step)(model, WINDOWS)[0])
    values = [loss(jnp.array(i)) for i in range(1, 6)]
    count = len(traces)
    for i, value in enumerate(values):
        expected = C.Supervised(i + 1)(Model(THETA), WINDOWS)[0]
        np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert count <= 4  # A check of shapes, the steps, a length that is skipped.


@pytest.mark.parametrize("steps", [2, 3])
def test_pushforward_is_a_longer_rollout_without_its_beginning(steps):
    # Cuts after `steps` model calls, and none before the end after that.
    weights = jnp.concatenate([jnp.zeros(steps), WEIGHTS[:2]])
    _assert_same(
        C.Pushforward(C.Supervised(2, **_weighted(2)), steps),
        C.Supervised(
            steps + 2, time_level_weights=weights, cut_bptt=True, cut_bptt_every=steps
        ),
    )


def test_pushforward_of_a_conditioned_model_shifts_its_forcing():
    _assert_same(
        C.Pushforward(C.Supervised(2), 2),
        C.Supervised(
            4,
            time_level_weights=jnp.array([0.0, 0.0, 1.0, 1.0]),
            cut_bptt=True,
            cut_bptt_every=2,
        ),
        FORCED,
        FORCED,
        _conditioned,
        _conditioned,
    )


def test_a_wrapper_that_declares_nothing_changes_nothing():
    plain = C.Supervised(4, **_weighted(4))
    _assert_same(plain, plain, model_b=lambda theta: tx.Stepper(Model(theta)))
    _assert_same(
        plain,
        plain,
        batch_b=FORCED,
        model_b=lambda theta: tx.Stepper(
            lambda u, inputs: _step(theta, u), conditioned=True
        ),
    )
    _assert_same(
        plain,
        plain,
        model_b=lambda theta: tx.Stepper(
            lambda u, key: _step(theta, u), stochastic=True
        ),
    )


@pytest.mark.parametrize("cut", [{}, {"cut_bptt": True, "cut_bptt_every": 2}])
def test_a_bundle_of_two_steps_is_two_steps(cut):
    # Calls are counted, so that every second step is every call.
    calls = {"cut_bptt": True} if cut else {}

    def pairs(theta):
        def module(u):
            first = _step(theta, u)
            return jnp.stack([first, _step(theta, first)])

        return tx.Stepper(module, bundle=2)

    _assert_same(
        C.Supervised(4, **_weighted(4), **cut),
        C.Supervised(4, **_weighted(4), **calls),
        model_b=pairs,
    )


def test_a_bundled_conditioned_model_gets_the_forcing_of_its_times():
    def pairs(theta):
        def module(u, inputs):
            first = _step(theta, u) * inputs.sample + inputs.time[0]
            second = _step(theta, first) * inputs.sample + inputs.time[1]
            return jnp.stack([first, second])

        return tx.Stepper(module, bundle=2, conditioned=True)

    plain = C.Supervised(4, **_weighted(4))
    _assert_same(plain, plain, FORCED, FORCED, _conditioned, pairs)


def test_noise_of_zero_is_no_noise():
    plain = C.Supervised(3, **_weighted(3))
    _assert_same(C.InputNoise(plain, 0.0), plain)
    _assert_same(
        C.InputNoise(plain, {"a": 0.0, "b": jnp.zeros(3)}),
        plain,
        TREES,
        TREES,
        _tree,
        _tree,
    )


def test_physics_that_is_the_model_is_a_longer_rollout():
    def of(theta):
        mixed = C.MixChainPostPhysics(2, 3, ref_stepper=Model(theta), **_weighted(5))
        return mixed(Model(theta), WINDOWS)[0]

    def longer(theta):
        return C.Supervised(5, **_weighted(5))(Model(theta), WINDOWS)[0]

    for a, b in zip(
        jax.value_and_grad(of)(THETA), jax.value_and_grad(longer)(THETA), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_composite_of_one_is_a_multiple():
    plain = C.Residuum(2, residuum_fn=_residuum, **_weighted(2))
    tripled = C.Residuum(2, residuum_fn=_residuum, time_level_weights=3 * WEIGHTS[:2])
    _assert_same(C.Composite([plain], [3.0]), tripled)


def test_references_may_not_be_differentiable_where_they_are_cut():
    @jax.custom_jvp
    def reference(u):
        return REF(u)

    @reference.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated")

    cut = C.DivertedChain(3, 2, ref_stepper=reference, cut_div_chain=True)
    expected = C.DivertedChain(3, 2, ref_stepper=REF, cut_div_chain=True)
    _assert_same(cut, expected)


def test_noise_differs_between_samples_times_and_leaves():
    seen = {}

    def module(u, key):
        return u + jax.random.normal(key, u.shape)

    states = tx.rollout(tx.Stepper(module, stochastic=True), jnp.zeros(2), 4, key=KEY)
    steps = jnp.diff(jnp.concatenate([jnp.zeros((1, 2)), states]), axis=0)
    assert len(np.unique(np.round(np.asarray(steps), 12))) == 8

    def loss(p, t):
        seen["p"] = p
        return jnp.sum(p["a"])

    noisy = C.InputNoise(C.Supervised(1, time_level_loss=tx.loss.BatchLoss(loss)), 1.0)
    zeros = {
        "a": jnp.zeros((3, 2, 2)),
        "b": jnp.zeros((3, 2, 2)),
        "n": jnp.ones((3, 2, 1), int),
    }
    with jax.disable_jit():
        noisy(lambda u: u, zeros | {"n": jnp.ones((3, 2, 1), int)}, key=KEY)
    values = np.concatenate([np.ravel(seen["p"]["a"]), np.ravel(seen["p"]["b"])])
    assert len(np.unique(np.round(values, 12))) == 12


# Size of programs.


def _of_length(steps):
    ref = {"ref_stepper": REF}
    yield "supervised", C.Supervised(steps)
    yield "cut", C.Supervised(steps, cut_bptt=True, cut_bptt_every=2)
    yield "residuum", C.Residuum(steps, residuum_fn=_residuum)
    yield "mix", C.MixChainPostPhysics(steps, steps, **ref)
    yield "diverted, main", C.DivertedChain(steps + 2, 2, **ref)
    yield "diverted, branch", C.DivertedChain(steps + 2, steps, **ref)
    yield "noise", C.InputNoise(C.Supervised(steps), 0.1)
    yield "push", C.Pushforward(C.Supervised(steps), steps)
    yield (
        "curriculum",
        at_step(C.Curriculum(C.Supervised(steps), lambda i: i), jnp.array(2)),
    )
    yield (
        "composite",
        C.Composite(
            [C.Supervised(steps), C.Residuum(steps, residuum_fn=_residuum)], [1.0, 2.0]
        ),
    )


def test_program_size_does_not_depend_on_the_rollout():
    def lines(configuration):
        windows = jax.ShapeDtypeStruct((2, configuration.num_times, 1, 4), float)

        def loss(theta, windows):
            return configuration(Model(theta), windows, key=KEY)[0]

        lowered = jax.jit(jax.grad(loss)).lower(THETA, windows)
        return lowered.as_text().count("\n")

    for (name, short), (_, long) in zip(_of_length(2), _of_length(128), strict=True):
        sizes = lines(short), lines(long)
        assert abs(sizes[1] - sizes[0]) <= 0.05 * sizes[0], name


# Bad input.


def _supervised(**options):
    return lambda: C.Supervised(3, **options)


def _diverted(*counts, **options):
    return lambda: C.DivertedChain(*counts, **({"ref_stepper": REF} | options))


BUILT = {
    "steps 0": (lambda: C.Supervised(0), "`num_rollout_steps`.*>= 1, got 0"),
    "steps -1": (lambda: C.Residuum(-1, residuum_fn=_residuum), "num_rollout_steps"),
    "steps 2.0": (lambda: C.Supervised(2.0), "`num_rollout_steps`.*got 2.0"),
    "steps True": (lambda: C.Supervised(True), "`num_rollout_steps`.*got True"),
    "mix steps": (
        lambda: C.MixChainPostPhysics(0, 1, ref_stepper=REF),
        "num_rollout_steps",
    ),
    "post": (
        lambda: C.MixChainPostPhysics(1, 0, ref_stepper=REF),
        "num_post_physics_steps",
    ),
    "diverted steps": (_diverted(0, 1), "`num_rollout_steps`"),
    "branch 0": (_diverted(3, 0), "`num_branch_steps`.*>= 1, got 0"),
    "branch long": (_diverted(3, 4), "at most `num_rollout_steps`.*got 4. Shorten"),
    "every 0": (_supervised(cut_bptt=True, cut_bptt_every=0), "cut_bptt_every"),
    "every 1.5": (_supervised(cut_bptt_every=1.5), "cut_bptt_every"),
    "cut": (_supervised(cut_bptt=1), "`cut_bptt` to be True or False, got 1"),
    "cut_div": (_diverted(3, 1, cut_div_chain="yes"), "`cut_div_chain`"),
    "cut_prev": (
        lambda: C.Residuum(1, residuum_fn=_residuum, cut_prev=None),
        "`cut_prev`",
    ),
    "cut_next": (
        lambda: C.Residuum(1, residuum_fn=_residuum, cut_next=0),
        "`cut_next`",
    ),
    "few weights": (
        _supervised(time_level_weights=jnp.ones(1)),
        r"`time_level_weights` to hold 3 real weights.*got float64\[1\]",
    ),
    "many weights": (_supervised(time_level_weights=[1.0] * 4), "hold 3 real weights"),
    "scalar weight": (_supervised(time_level_weights=2.0), "hold 3 real weights"),
    "complex weights": (
        _supervised(time_level_weights=jnp.ones(3) * 1j),
        "hold 3 real weights",
    ),
    "text weights": (_supervised(time_level_weights="abc"), "hold 3 real weights"),
    "nan weights": (
        _supervised(time_level_weights=[1.0, float("nan"), 1.0]),
        "`time_level_weights` to be finite",
    ),
    "branch weights": (
        _diverted(3, 2, branch_level_weights=jnp.ones(3)),
        "`branch_level_weights` to hold 2 real weights",
    ),
    "mix weights": (
        lambda: C.MixChainPostPhysics(
            2, 1, ref_stepper=REF, time_level_weights=jnp.ones(2)
        ),
        "hold 3 real weights",
    ),
    "loss": (_supervised(time_level_loss=None), "`time_level_loss` to be callable"),
    "ref": (_diverted(3, 1, ref_stepper=jnp.ones(3)), "`ref_stepper` to be callable"),
    "residuum": (
        lambda: C.Residuum(residuum_fn="heat"),
        "`residuum_fn` to be callable, got 'heat'",
    ),
    "stateful residuum": (
        lambda: C.Residuum(residuum_fn=tx.Stepper(_residuum, NORM_STATE)),
        "`residuum_fn` without state",
    ),
    "bundled residuum": (
        lambda: C.Residuum(residuum_fn=tx.Stepper(_residuum, bundle=2)),
        "`residuum_fn` without state or bundle",
    ),
    "horizon": (_supervised(horizon=4), "`horizon` to be an integer in 1 ... 3, got 4"),
    "horizon 0": (_supervised(horizon=jnp.array(0)), "`horizon`.*in 1 ... 3"),
    "horizon below a branch": (
        _diverted(4, 3, ref_stepper=REF, horizon=2),
        "`horizon` to be an integer in 3 ... 4, got 2",
    ),
    "composite empty": (lambda: C.Composite([], []), "at least one configuration"),
    "composite weights": (
        lambda: C.Composite([C.Supervised(), C.Supervised(2)], [1.0]),
        "`weights` to hold 2 real weights .configurations.",
    ),
    "composite member": (
        lambda: C.Composite([C.Supervised(), REF], [1.0, 1.0]),
        r"configurations\[1\] to be a configuration",
    ),
    "noise inner": (lambda: C.InputNoise(REF, 0.1), "`configuration` to be a"),
    "noise negative": (lambda: C.InputNoise(C.Supervised(), -0.1), "`std`.*>= 0"),
    "noise nan": (
        lambda: C.InputNoise(C.Supervised(), jnp.array([1.0, jnp.nan])),
        "`std` to be finite",
    ),
    "noise text": (lambda: C.InputNoise(C.Supervised(), "small"), "`std`"),
    "push inner": (lambda: C.Pushforward(None, 2), "`configuration` to be a"),
    "push steps": (lambda: C.Pushforward(C.Supervised(), 0), "`num_steps`"),
    "curriculum inner": (lambda: C.Curriculum(3, len), "`configuration` to be a"),
    "curriculum of mix": (
        lambda: C.Curriculum(C.MixChainPostPhysics(ref_stepper=REF), len),
        "a configuration with a horizon.*got MixChain",
    ),
    "curriculum of noise": (
        lambda: C.Curriculum(C.InputNoise(C.Supervised(), 0.1), len),
        "horizon.*got InputNoise. Put the curriculum",
    ),
    "schedule": (lambda: C.Curriculum(C.Supervised(), 3), "`schedule` to be callable"),
}


@pytest.mark.parametrize("name", BUILT)
def test_bad_options_are_refused_when_built(name):
    build, message = BUILT[name]
    with pytest.raises(ValueError, match=message):
        build()


def _wide(u):
    return jnp.concatenate([u, u])


def _half(u):
    return u.astype("f4")


STOCHASTIC = tx.Stepper(lambda u, key: u, stochastic=True)
CONDITIONED = tx.Stepper(lambda u, inputs: u, conditioned=True)
PAIRS = tx.Stepper(lambda u: jnp.stack([u, u]), bundle=2)
SAME = lambda u: u  # noqa: E731
ONE = C.DivertedChainBranchOne(3, ref_stepper=SAME)
MIX = C.MixChainPostPhysics(2, 1, ref_stepper=SAME)
RES = C.Residuum(3, residuum_fn=_residuum)
CALLED = {
    "short": (C.Supervised(6), SAME, WINDOWS, "Supervised to get windows.*L >= 7"),
    "short mix": (MIX, SAME, WINDOWS[:, :3], "MixChainPostPhysics.*L >= 4"),
    "short push": (
        C.Pushforward(C.Supervised(3), 3),
        SAME,
        WINDOWS,
        "Pushforward.*L >= 7",
    ),
    "short noise": (
        C.InputNoise(C.Supervised(6), 0.1),
        SAME,
        WINDOWS,
        "InputNoise.*L >= 7",
    ),
    "no axes": (C.Supervised(), SAME, jnp.ones(3), r"got \[3\] for states"),
    "scalar": (C.Supervised(), SAME, jnp.array(1.0), r"got \[\] for states"),
    "no model": (C.Supervised(), 3, WINDOWS, "`model` to be callable, got 3"),
    "nothing": (C.Supervised(), SAME, {}, "array leaves .B, L, .... for Supervised"),
    "other batch": (
        C.Supervised(),
        lambda u: u,
        {"a": WINDOWS, "b": WINDOWS[:2]},
        r"got \[2, 6, 2, 4\] for states\['b'\]",
    ),
    "other samples": (
        C.Supervised(),
        CONDITIONED,
        tx.Window(WINDOWS, jnp.ones(2)),
        r"got \[2\] for sample",
    ),
    "shape": (C.Supervised(), _wide, WINDOWS, r"`model` to return.*got .*\[3, 4, 4\]"),
    "dtype": (C.Supervised(), _half, WINDOWS, r"`model`.*float64.*got .*float32"),
    "structure": (C.Supervised(), lambda u: (u,), WINDOWS, "`model` to return a batch"),
    "ref shape": (
        C.DivertedChain(3, 2, ref_stepper=_wide),
        SAME,
        WINDOWS,
        "`ref_stepper` to return a batch",
    ),
    "physics dtype": (
        C.MixChainPostPhysics(ref_stepper=_half),
        SAME,
        WINDOWS,
        "`ref_stepper` to return a batch",
    ),
    "residuum model": (RES, _wide, WINDOWS, "`model` to return a batch"),
    "undeclared bundle": (
        C.Supervised(2),
        PAIRS.module,
        WINDOWS,
        "bundle=m",
    ),
    "odd bundle": (C.Supervised(3), PAIRS, WINDOWS, "a multiple of the model's bundle"),
    "bundled diverted": (ONE, PAIRS, WINDOWS, "one time for DivertedChain .model"),
    "bundled reference": (
        C.DivertedChain(3, ref_stepper=PAIRS),
        SAME,
        WINDOWS,
        "one time for DivertedChain .ref_stepper",
    ),
    "bundled mix": (MIX, PAIRS, WINDOWS, "one time for MixChainPostPhysics"),
    "bundled residuum": (RES, PAIRS, WINDOWS, "one time for Residuum"),
    "bundled push": (
        C.Pushforward(C.Supervised(2), 1),
        PAIRS,
        WINDOWS,
        "a multiple of the stepper's bundle",
    ),
    "key": (C.Supervised(), STOCHASTIC, WINDOWS, "a key for the stochastic .*`model`"),
    "key ref": (
        C.DivertedChain(2, ref_stepper=STOCHASTIC),
        SAME,
        WINDOWS,
        "a key for the stochastic stepper `ref_stepper`",
    ),
    "key mix": (
        C.MixChainPostPhysics(ref_stepper=STOCHASTIC),
        SAME,
        WINDOWS,
        "a key .*`ref_stepper`",
    ),
    "key residuum": (RES, STOCHASTIC, WINDOWS, "a key .*`model`"),
    "key residuum_fn": (
        C.Residuum(residuum_fn=tx.Stepper(lambda n, p, key: n, stochastic=True)),
        SAME,
        WINDOWS,
        "a key .*`residuum_fn`",
    ),
    "key noise": (C.InputNoise(C.Supervised(), 0.1), SAME, WINDOWS, "a key for InputN"),
    "key push": (
        C.Pushforward(C.Supervised(), 1),
        STOCHASTIC,
        WINDOWS,
        "a key for the stochastic",
    ),
    "no inputs": (C.Supervised(), CONDITIONED, WINDOWS, "inputs for `model`.*Window"),
    "short forcing": (
        C.DivertedChainBranchOne(3, ref_stepper=SAME),
        CONDITIONED,
        tx.Window(WINDOWS, None, WINDOWS[:, :2]),
        "forcing for 3 steps of `model`, got 2",
    ),
    "short forcing ref": (
        C.DivertedChainBranchOne(3, ref_stepper=CONDITIONED),
        SAME,
        tx.Window(WINDOWS, None, WINDOWS[:, :2]),
        "forcing for 3 steps of `ref_stepper`",
    ),
    "short forcing residuum": (
        C.Residuum(3, residuum_fn=tx.Stepper(_forced_residuum, conditioned=True)),
        SAME,
        tx.Window(WINDOWS, None, WINDOWS[:, :1]),
        "forcing for 3 steps of `residuum_fn`",
    ),
    "std shape": (
        C.InputNoise(C.Supervised(), jnp.ones(3)),
        SAME,
        WINDOWS,
        r"`std` to broadcast against a state \[2, 4\], got \[3\]",
    ),
    "std structure": (
        C.InputNoise(C.Supervised(), {"a": 1.0}),
        SAME,
        WINDOWS,
        "`std` to be one array or a PyTree like the state",
    ),
    "vector loss": (
        C.Supervised(time_level_loss=lambda p, t: p - t),
        SAME,
        WINDOWS,
        "a loss that returns a scalar",
    ),
}
NEEDS_KEY = ("short noise", "std shape", "std structure")


@pytest.mark.parametrize("name", CALLED)
def test_bad_calls_are_refused_before_any_compute(name):
    configuration, model, batch, message = CALLED[name]
    key = KEY if name in NEEDS_KEY else None
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: configuration(model, batch, key=key)[0])


def test_configurations_may_be_built_under_transformations():
    def loss(theta, weight, step):
        weights = jnp.stack([weight, 2 * weight])
        std = jnp.full((2, 1), 0.1)
        configuration = C.Composite(
            [
                C.Supervised(2, time_level_weights=weights),
                C.Supervised(3, time_level_weights=[1.0, 2.0, 0.5], horizon=2),
                C.InputNoise(C.Supervised(2), std=weight),
                C.InputNoise(C.Supervised(2, horizon=step), std=std),
            ],
            [0.5, weight, 1, 2],
        )
        return configuration(Model(theta), WINDOWS, key=KEY)[0]

    weights = jnp.array([0.3, 1.2])
    steps = jnp.array([1, 2])
    together = _jit(jax.vmap(loss, (None, 0, 0)))(THETA, weights, steps)
    for i in range(2):
        one = _jit(loss)(THETA, weights[i], steps[i])
        np.testing.assert_allclose(together[i], one, rtol=1e-12)


def test_a_wrong_adjoint_is_refused_by_every_configuration():
    class ImplicitAdjoint:
        pass

    options = {"adjoint": ImplicitAdjoint()}
    for build in (
        lambda: C.Supervised(**options),
        lambda: C.DivertedChain(ref_stepper=REF, **options),
        lambda: C.DivertedChainBranchOne(ref_stepper=REF, **options),
        lambda: C.MixChainPostPhysics(ref_stepper=REF, **options),
        lambda: C.Residuum(residuum_fn=_residuum, **options),
    ):
        with pytest.raises(ValueError, match="rollout layer, got ImplicitAdjoint"):
            build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tx.Stepper(3), "`module` to be callable, got 3"),
        (lambda: tx.Stepper(SAME, {"mean": 0.0}), "`state` to be an eqx.nn.State"),
        (lambda: tx.Stepper(SAME, stochastic=1), "`stochastic` to be True or False"),
        (lambda: tx.Stepper(SAME, conditioned=None), "`conditioned` to be True"),
        (lambda: tx.Stepper(SAME, bundle=0), "`bundle` to be an integer >= 1"),
        (lambda: STOCHASTIC(jnp.ones(2)), "a key for the stochastic stepper"),
    ],
)
def test_steppers_refuse_what_they_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_stateful_stepper_can_be_called_again():
    net, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        2, "batch", mode="batch", dtype=float
    )
    stepper = tx.Stepper(net, state)
    call = jax.vmap(stepper, axis_name="batch")
    first = call(WINDOWS[:, 0])
    np.testing.assert_array_equal(call(WINDOWS[:, 0]), first)
    one = jax.vmap(lambda x: x, axis_name="batch")(WINDOWS[:1, 0])
    assert jax.vmap(stepper, axis_name="batch")(one).shape == (1, 2, 4)
