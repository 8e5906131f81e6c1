"""Rollouts against Python loops and exponax."""

import equinox as eqx
import exponax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx

KEY = jax.random.key(2)
THETA = jnp.array([0.8, -0.3, 0.2])


def _data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.1, 0.7, shape))


def _step(theta, u):
    return theta[0] * u + theta[1] * jnp.roll(u, 1, -1) + theta[2] * u**2


def model(u):
    return _step(THETA, u)


U0 = _data(2, 5)


def _loop(step, u, count):
    states = []
    for t in range(count):
        u = step(u, t)
        states.append(u)
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_states_are_those_of_a_loop_and_of_exponax(count):
    states = tx.rollout(model, U0, count)
    assert states.shape == (count, 2, 5) and states.dtype == U0.dtype
    expected = _loop(lambda u, t: model(u), U0, count)
    np.testing.assert_allclose(states, expected, rtol=1e-13)
    full = tx.rollout(model, U0, count, include_initial=True)
    np.testing.assert_array_equal(full[0], U0)
    np.testing.assert_array_equal(full[1:], states)
    peer = exponax.rollout(model, count, include_init=True)(U0)
    np.testing.assert_allclose(full, peer, rtol=1e-13)


def test_states_may_be_trees_of_any_dtype():
    def step(u):
        return {
            "f": (u["f"][0] * jnp.float32(0.5),),
            "n": u["n"] + 3,
            "z": u["z"] * 1j,
        }

    u0 = {
        "f": (np.ones((2, 3), np.float32),),
        "n": np.arange(2),
        "z": jnp.array(1.0 + 0j),
    }
    states = tx.rollout(step, u0, 3, include_initial=True)
    np.testing.assert_array_equal(states["f"][0][:, 0, 0], [1, 0.5, 0.25, 0.125])
    np.testing.assert_array_equal(states["n"][:, 1], [1, 4, 7, 10])
    np.testing.assert_allclose(states["z"], [1, 1j, -1, -1j])
    assert states["f"][0].dtype == jnp.float32 and states["n"].dtype == jnp.int64


@pytest.mark.parametrize(
    "adjoint",
    [
        tx.DirectAdjoint(),
        tx.RecursiveCheckpointAdjoint(),
        tx.RecursiveCheckpointAdjoint(6),
        tx.KStepAdjoint(3),
        tx.OneStepAdjoint(),
    ],
)
def test_adjoints_change_the_derivative_only(adjoint):
    def weighted(theta, scan):
        states = scan(theta)
        weights = jnp.arange(1.0, 9.0)
        return jnp.sum(weights * jnp.mean(states**2, axis=(1, 2)))

    def rolled(theta):
        return tx.rollout(lambda u: _step(theta, u), U0, 8, adjoint=adjoint)

    np.testing.assert_array_equal(rolled(THETA), tx.rollout(model, U0, 8))
    every = getattr(adjoint, "k", 99)

    def looped(theta):
        def step(u, t):
            if t > 0 and t % every == 0:
                u = jax.lax.stop_gradient(u)
            return _step(theta, u)

        return _loop(step, U0, 8)

    grad = jax.jit(jax.grad(lambda theta: weighted(theta, rolled)))(THETA)
    grad_u = jax.jit(jax.grad(lambda theta: weighted(theta, looped)))(THETA)
    np.testing.assert_allclose(grad, grad_u, rtol=1e-12)


def test_gradient_is_a_finite_difference_in_state_and_parameters():
    def last(theta, u):
        return jnp.sum(jnp.sin(tx.rollout(lambda u: _step(theta, u), u, 6)[-1]))

    d_theta, d_u = jnp.array([1.0, -0.4, 0.3]), _data(2, 5, seed=3)

    def along(eps):
        return last(THETA + eps * d_theta, U0 + eps * d_u)

    numeric = (8 * (along(1e-4) - along(-1e-4)) - along(2e-4) + along(-2e-4)) / 12e-4
    grads = jax.grad(last, (0, 1))(THETA, U0)
    analytic = grads[0] @ d_theta + jnp.vdot(grads[1], d_u)
    np.testing.assert_allclose(analytic, numeric, rtol=1e-9)


def test_conditioned_steppers_see_the_inputs_of_their_time():
    stepper = tx.Stepper(
        lambda u, inputs: model(u) * inputs.sample["a"] + inputs.time, conditioned=True
    )
    time, sample = _data(4, 2, 1, seed=4), {"a": 1.3}
    states = tx.rollout(stepper, U0, 4, sample=sample, time=time)
    expected = _loop(lambda u, t: model(u) * 1.3 + time[t], U0, 4)
    np.testing.assert_allclose(states, expected, rtol=1e-13)
    # A longer forcing is cut, and one call of the stepper is one step.
    longer = tx.rollout(stepper, U0, 3, sample=sample, time=time)
    np.testing.assert_array_equal(longer, states[:3])
    one = stepper(U0, tx.Inputs(sample, time[0]))
    np.testing.assert_allclose(one, states[0], rtol=1e-13)


def test_conditioned_steppers_may_have_one_kind_of_input():
    by_sample = tx.Stepper(lambda u, i: u * i.sample, conditioned=True)
    np.testing.assert_allclose(
        tx.rollout(by_sample, jnp.ones(1), 3, sample=2.0)[:, 0], [2, 4, 8]
    )
    by_time = tx.Stepper(lambda u, i: u + i.time, conditioned=True)
    np.testing.assert_allclose(
        tx.rollout(by_time, jnp.ones(1), 3, time=jnp.arange(1.0, 4.0)[:, None])[:, 0],
        [2, 4, 7],
    )


def test_bundles_are_flattened_in_time():
    def module(u, inputs):
        first = model(u) + inputs.time[0]
        return jnp.stack([first, model(first) + inputs.time[1]])

    time = _data(6, 1, 1, seed=5)
    pairs = tx.Stepper(module, bundle=2, conditioned=True)
    states = tx.rollout(pairs, U0, 6, time=time, include_initial=True)
    expected = _loop(lambda u, t: model(u) + time[t], U0, 6)
    np.testing.assert_array_equal(states[0], U0)
    np.testing.assert_allclose(states[1:], expected, rtol=1e-13)


def test_noise_is_a_function_of_key_and_time():
    stepper = tx.Stepper(
        lambda u, key: 0.5 * u + jax.random.normal(key, u.shape), stochastic=True
    )
    long = tx.rollout(stepper, U0, 5, key=KEY)
    np.testing.assert_array_equal(tx.rollout(stepper, U0, 3, key=KEY), long[:3])
    noise = long - 0.5 * jnp.concatenate([U0[None], long[:-1]])
    assert len(np.unique(np.round(np.asarray(noise), 12))) == noise.size
    other = tx.rollout(stepper, U0, 5, key=jax.random.key(3))
    assert (other != long).all()


def test_states_of_layers_are_carried():
    class Counter(eqx.Module):
        index: eqx.nn.StateIndex

        def __init__(self):
            self.index = eqx.nn.StateIndex(jnp.array(0.0))

        def __call__(self, u, state):
            count = state.get(self.index) + 1
            return u + count, state.set(self.index, count)

    stepper = tx.Stepper(*eqx.nn.make_with_state(Counter)())
    states = tx.rollout(stepper, jnp.zeros(1), 4)
    np.testing.assert_array_equal(states[:, 0], [1, 3, 6, 10])
    # The stepper itself is left as it was.
    np.testing.assert_array_equal(tx.rollout(stepper, jnp.zeros(1), 4), states)
    assert stepper(jnp.zeros(1)) == stepper(jnp.zeros(1)) == 1


def test_vmap_over_states_samples_and_models():
    many = _data(3, 2, 5, seed=6)
    together = jax.vmap(lambda u: tx.rollout(model, u, 4))(many)
    for u, states in zip(many, together, strict=True):
        np.testing.assert_allclose(states, tx.rollout(model, u, 4), rtol=1e-13)
    thetas = jnp.stack([THETA, 2 * THETA])
    models = jax.vmap(lambda p: tx.rollout(lambda u: _step(p, u), U0, 4))(thetas)
    np.testing.assert_allclose(models[0], tx.rollout(model, U0, 4), rtol=1e-13)


def test_one_trace_and_one_size_of_program():
    traces = []

    def counted(u):
        traces.append(None)
        return model(u)

    rolled = jax.jit(lambda u: tx.rollout(counted, u, 9))
    rolled(U0)
    count = len(traces)
    rolled(2 * U0)
    assert len(traces) == count <= 3

    def lines(length):
        lowered = jax.jit(lambda u: tx.rollout(model, u, length)).lower(U0)
        return lowered.as_text().count("\n")

    assert lines(2) == lines(500)


CONDITIONED = tx.Stepper(lambda u, inputs: u, conditioned=True)
PAIRS = tx.Stepper(lambda u: jnp.stack([u, u]), bundle=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tx.rollout(model, U0, 0), "`num_steps` to be an integer >= 1, got 0"),
        (lambda: tx.rollout(model, U0, 2.0), "`num_steps`.*got 2.0"),
        (lambda: tx.rollout(model, U0, True), "`num_steps`.*got True"),
        (
            lambda: tx.rollout(model, U0, 2, include_initial=1),
            "`include_initial` to be True or False, got 1",
        ),
        (
            lambda: tx.rollout(tx.Stepper(model, stochastic=True), U0, 2),
            "a key for the stochastic stepper `stepper`",
        ),
        (
            lambda: tx.rollout(lambda u: u[:1], U0, 2),
            r"`stepper` to return .*\[1, 1, 5",
        ),
        (lambda: tx.rollout(lambda u: u > 0, U0, 2), "`stepper` to return .*bool"),
        (lambda: tx.rollout(lambda u: (u, u), U0, 2), "`stepper` to return a batch"),
        (lambda: tx.rollout(PAIRS.module, U0, 2), "Stepper.module, bundle=m"),
        (lambda: tx.rollout(PAIRS, U0, 3), "multiple of the stepper's bundle.*Pass 4"),
        (lambda: tx.rollout(CONDITIONED, U0, 2), "inputs for `stepper`.*declared as"),
        (
            lambda: tx.rollout(CONDITIONED, U0, 3, time=jnp.ones((2, 1))),
            "`time` to hold forcing for 3 steps of `stepper`, got 2 times",
        ),
        (
            lambda: tx.rollout(CONDITIONED, U0, 3, time=1.0),
            "`time` to have a leading axis of times",
        ),
        (
            lambda: tx.rollout(model, U0, 2, adjoint="checkpoint"),
            "an adjoint of the rollout layer, got 'checkpoint'",
        ),
        (
            lambda: tx.rollout(model, U0, 40, adjoint=tx.RecursiveCheckpointAdjoint(3)),
            "at least .* checkpoints for a loop of 40 steps, got 3",
        ),
        (lambda: tx.rollout(3, U0, 2), "`stepper` to be callable, got 3"),
        (lambda: tx.rollout(model, {}, 2), "a state with at least one array"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
