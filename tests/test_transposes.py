"""Transposes that are put off: the same values, and fewer of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from trainax_pk.engine import fast_convolutions
from trainax_pk.engine._jaxpr import walk_equations
from trainax_pk.engine._transposes import put_off_transposes


def _data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.2, 0.9, shape))


def _count(fn, *args, name="transpose"):
    jaxpr = jax.make_jaxpr(fn)(*args)
    return sum(eqn.primitive.name == name for eqn, _ in walk_equations(jaxpr))


def _check(fn, *args, left):
    new = put_off_transposes(fn)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13),
        new(*args),
        fn(*args),
    )
    same = jax.eval_shape(new, *args), jax.eval_shape(fn, *args)
    assert same[0] == same[1]
    assert _count(new, *args) == left < _count(fn, *args)


def _last(u):
    return jnp.moveaxis(u, 1, -1)


def _first(u):
    return jnp.moveaxis(u, -1, 1)


U = _data(2, 3, 5)
V = _data(2, 3, 5, seed=1)
BIAS = _data(3, 1, seed=2)

# What lies between two transposes that cancel.
BETWEEN = {
    "nothing": lambda u: u,
    "activation": jax.nn.relu,
    "jit and custom rules": lambda u: jax.nn.silu(jax.nn.softplus(u)),
    "a bias": lambda u: u + BIAS[None],
    "a full array": lambda u: u * V,
    "selection": lambda u: jnp.where(u > 0.1, u, 2 * u),
    "one choice for all": lambda u: lax.select(jnp.max(u) > 0.1, u, 2 * u),
    "periodic border": lambda u: jnp.pad(u, ((0, 0), (0, 0), (1, 2)), mode="wrap"),
    "zero border": lambda u: jnp.pad(u, ((0, 0), (1, 0), (0, 2))),
    "a slice": lambda u: u[:, 1:, ::2],
    "a slice of one": lambda u: u[:, :, -1:] + u,
    "reversal": lambda u: u[:, ::-1, ::-1],
    "axes of length 1": lambda u: (u[:, None] + 1)[:, 0],
    "mean over space": lambda u: u - jnp.mean(u, axis=2, keepdims=True),
    "largest": lambda u: u - jnp.max(u, axis=(0, 2), keepdims=True),
    "parts": lambda u: jnp.concatenate([u[:, :1], jnp.cos(u), u[:, 2:]], axis=1),
    "a split": lambda u: sum(jnp.split(u, [2, 4], axis=2)[:2], 0 * u[..., :2]),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_transposes_around_it_cancel(name):
    def fn(u):
        return _last(BETWEEN[name](_first(u)))

    # What is not transposed itself, but met by what is, may have to be once.
    _check(fn, _last(U), left=int(name == "a full array"))


def test_gradients_are_rewritten_as_well():
    def loss(u, v):
        return jnp.sum(jnp.tanh(_last(jax.nn.relu(_first(u)) * 2)) * v)

    gradient = jax.grad(loss, (0, 1))
    # The one that is left is of the zeros that relu's derivative selects.
    _check(gradient, _last(U), _last(V), left=1)


def test_products_take_operands_as_they_lie():
    def fn(u, v):
        return jnp.tensordot(_first(u), _first(v), ((0, 2), (0, 2)))

    _check(fn, _last(U), _last(V), left=0)


def test_bodies_of_loops_branches_and_checkpoints():
    def step(u):
        return _last(jnp.sin(_first(u)))

    def fn(u):
        u = lax.scan(lambda u, _: (jax.checkpoint(step)(u), None), u, length=3)[0]
        u = lax.fori_loop(0, 2, lambda i, u: step(u) + i, u)
        return lax.cond(u[0, 0, 0] > 0, step, lambda u: 2 * step(u), u)

    _check(fn, _last(U), left=0)


def test_checkpoints_keep_their_barriers():
    def loss(u):
        return jnp.sum(jax.checkpoint(lambda u: _last(jnp.sin(_first(jnp.exp(u)))))(u))

    new = put_off_transposes(jax.grad(loss))
    names = ("checkpoint", "remat", "remat2")
    assert sum(_count(new, _last(U), name=name) for name in names) == 1
    assert _count(new, _last(U)) == 0


def test_results_come_out_in_their_own_order():
    def fn(u):
        v = u.T
        # The axis that is joined is of length 0 in a part, and of 1 in the whole.
        thin = jnp.concatenate([v[:0], v[:1]], axis=0)
        return v, jnp.exp(v), v.reshape(15, 2), lax.cumsum(v, axis=0), thin

    new = put_off_transposes(fn)
    for a, b in zip(new(U), fn(U), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_chain_of_permutations_is_the_same(data):
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4))
    orders = data.draw(
        st.lists(st.permutations(range(len(shape))), min_size=1, max_size=4)
    )
    axis = data.draw(st.integers(0, len(shape) - 1))

    def fn(u):
        for order in orders:
            u = jnp.transpose(u, order)
            u = u + jnp.sum(u, axis=axis, keepdims=True)
            u = jnp.concatenate([u, 2 * u], axis=axis)
        return u, jnp.flip(u, axis)[None, ..., None]

    u = _data(*shape)
    # Whole programs: each operation alone would be compiled for its shape.
    for a, b in zip(jax.jit(put_off_transposes(fn))(u), jax.jit(fn)(u), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


@pytest.mark.parametrize("dims", [1, 2])
def test_a_convolution_network_keeps_the_order_of_its_convolutions(dims):
    rng = np.random.default_rng(3)
    taps = (3,) * dims
    weights = [
        jnp.asarray(rng.normal(0, 0.1, (o, i, *taps)), jnp.float32)
        for i, o in ((1, 32), (32, 32), (32, 32), (32, 1))
    ]
    space = (64,) if dims == 1 else (16, 16)
    u = jnp.asarray(rng.normal(0, 1, (20, 1, *space)), jnp.float32)

    def loss(weights, u):
        def step(u, _):
            for w in weights:
                around = [(0, 0), (0, 0), *[(1, 1)] * dims]
                u = jnp.pad(u, around, mode="wrap")
                u = lax.conv_general_dilated(u, w, (1,) * dims, "VALID")
                u = jax.nn.relu(u) if w is not weights[-1] else u
            return u, None

        return jnp.mean(lax.scan(step, u, length=2)[0] ** 2)

    gradient = jax.value_and_grad(loss)
    fast = fast_convolutions(gradient)
    new = put_off_transposes(fast)
    expected = gradient(weights, u)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(b)))
        ),
        jax.jit(new)(weights, u),
        expected,
    )

    def moved(fn):
        """How many activations of 32 channels are transposed, but for constants."""
        count, constants = 0, set()
        for eqn, _ in walk_equations(jax.make_jaxpr(fn)(weights, u)):
            if eqn.primitive.name == "broadcast_in_dim":
                constants.update(eqn.outvars)
            elif eqn.primitive.name == "transpose" and eqn.invars[0] not in constants:
                count += eqn.outvars[0].aval.size >= 32 * u.size
        return count

    # What is left: both operands of each gradient by a kernel, states between steps.
    assert moved(new) + 2 <= moved(fast)
