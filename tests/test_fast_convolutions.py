"""Rewritten convolutions: equal values, unchanged programs around them, a sane rule."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from trainax_pk.engine import _fast_convolutions as module
from trainax_pk.engine._convolution_forms import (
    channels_last,
    group_after_group,
    one_by_one,
    read_convolution,
    shift_and_add,
    side_by_side,
    tap_products,
)
from trainax_pk.engine._convolution_rule import choose_form
from trainax_pk.engine._fast_convolutions import (
    fast_convolutions,
    has_loop_convolutions,
    inspect_loops,
    platform_needs_it,
)
from trainax_pk.engine._jaxpr import replace_equations, walk_equations

FORMS = [channels_last, tap_products, shift_and_add]


def _array(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _convolutions(fn, *args):
    jaxpr = jax.make_jaxpr(fn)(*args)
    return [
        eqn
        for eqn, _ in walk_equations(jaxpr)
        if eqn.primitive.name == "conv_general_dilated"
    ]


def _names(fn, *args):
    return [eqn.primitive.name for eqn, _ in walk_equations(jax.make_jaxpr(fn)(*args))]


def _close(actual, expected, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = np.abs(np.asarray(b)).max() + 1e-300
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


@pytest.fixture
def forced(monkeypatch):
    """Puts one form everywhere, so that small arrays are rewritten too."""

    def force(form=channels_last):
        def choose(conv):
            # Shifting and adding is no form of a gradient by the kernel.
            unfit = form is shift_and_add and conv.is_kernel_gradient
            fit = tap_products if unfit else form
            if conv.groups == 1:
                return fit
            grouped = group_after_group if form is channels_last else side_by_side
            return grouped(fit)

        monkeypatch.setattr(module, "choose_form", choose)

    return force


def _numpy_convolution(x, w, stride, padding, dilation):
    x = np.pad(x, [(0, 0), (0, 0), padding])
    points = (x.shape[2] - (w.shape[2] - 1) * dilation - 1) // stride + 1
    out = np.zeros((x.shape[0], w.shape[0], points))
    for p in range(points):
        for k in range(w.shape[2]):
            out[:, :, p] += x[:, :, p * stride + k * dilation] @ w[:, :, k].T
    return out


@pytest.mark.parametrize("form", FORMS)
def test_form_matches_numpy_loop(form, forced):
    forced(form)
    x, w = _array(3, 2, 11), _array(5, 2, 4, seed=1)

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (2,), ((1, 3),), rhs_dilation=(2,))

    actual = fast_convolutions(conv)(x, w)
    expected = _numpy_convolution(np.asarray(x), np.asarray(w), 2, (1, 3), 2)
    np.testing.assert_allclose(actual, expected, atol=1e-13)


SETTINGS = {
    "circular 1d": ((3, 2, 12), (5, 2, 3), {}),
    "zero padded 1d": ((3, 2, 12), (5, 2, 3), {"padding": ((1, 2),)}),
    "cropped 1d": ((3, 2, 12), (5, 2, 3), {"padding": ((-1, 2),)}),
    "strided 1d": ((3, 2, 13), (5, 2, 4), {"window_strides": (3,)}),
    "dilated 1d": ((3, 2, 13), (5, 2, 3), {"rhs_dilation": (4,)}),
    "transposed 1d": (
        (3, 2, 7),
        (5, 2, 4),
        {"lhs_dilation": (2,), "padding": ((2, 3),)},
    ),
    "2d": (
        (2, 3, 9, 7),
        (4, 3, 3, 2),
        {"window_strides": (2, 1), "padding": ((1, 1), (0, 1))},
    ),
    "3d": ((2, 3, 5, 6, 4), (2, 3, 2, 3, 1), {"padding": ((1, 0), (1, 1), (0, 0))}),
    "grouped 1d": ((3, 6, 12), (9, 2, 3), {"feature_group_count": 3}),
    "batch-grouped 1d": ((6, 2, 12), (9, 2, 3), {"batch_group_count": 3}),
    "channels last": (
        (3, 12, 2),
        (3, 2, 5),
        {"dimension_numbers": ("NWC", "WIO", "NWC")},
    ),
    "mixed layout": (
        (12, 3, 2),
        (2, 5, 3),
        {"dimension_numbers": ("WNC", "IOW", "CWN"), "padding": ((2, 0),)},
    ),
}


def _conv(name):
    lhs, rhs, options = SETTINGS[name]
    num = len(lhs) - 2
    filled = {"window_strides": (1,) * num, "padding": ((0, 0),) * num} | options
    return (
        functools.partial(lax.conv_general_dilated, **filled),
        _array(*lhs),
        _array(*rhs, seed=1),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SETTINGS)
def test_forward_and_both_gradients_match(name, form, forced):
    forced(form)
    conv, x, w = _conv(name)

    def loss(x, w):
        return jnp.sum(jnp.sin(conv(x, w)))

    update = jax.value_and_grad(loss, argnums=(0, 1))
    assert len(_convolutions(update, x, w)) == 3
    # As programs: operation by operation there is more to compile.
    _close(jax.jit(fast_convolutions(update))(x, w), jax.jit(update)(x, w))


@given(
    batch=st.integers(1, 4),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    taps=st.integers(1, 4),
    points=st.integers(4, 9),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    form=st.sampled_from(FORMS),
)
@settings(max_examples=15, deadline=None)
def test_any_geometry(batch, channels, taps, points, stride, dilation, padding, form):
    reach = (taps - 1) * dilation
    x, w = _array(batch, channels[0], points + reach), _array(*channels[::-1], taps)

    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (stride,), (padding,), rhs_dilation=(dilation,)
        )

    (eqn,) = _convolutions(conv, x, w)
    found = read_convolution(eqn)
    if form is shift_and_add and found.is_kernel_gradient:
        return
    assert found.multiply_adds == batch * math.prod(channels) * taps * math.prod(
        eqn.outvars[0].aval.shape[2:]
    )
    fast = jax.jit(lambda x, w: form(x, w, found))
    _close(fast(x, w), jax.jit(conv)(x, w))


@pytest.mark.parametrize("shape", [(6,), (4, 5)])
def test_one_by_one_matches(shape):
    x, w = _array(3, 2, *shape), _array(5, 2, *(1 for _ in shape), seed=1)

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1,) * len(shape), "VALID")

    (eqn,) = _convolutions(conv, x, w)
    _close(one_by_one(x, w, read_convolution(eqn)), conv(x, w))


def _rollout_loss(w, u, *, remat):
    def step(u, _):
        new = lax.conv_general_dilated(
            jnp.pad(u, ((0, 0), (0, 0), (1, 1)), mode="wrap"), w, (1,), "VALID"
        )
        return jnp.tanh(new), jnp.mean(new**2)

    step = jax.checkpoint(step) if remat else step
    return jnp.sum(lax.scan(step, u, length=4)[1])


@pytest.mark.parametrize("remat", [False, True])
def test_training_in_nested_loops_matches(remat, forced):
    forced()
    w, data = _array(3, 3, 3) / 3, _array(5, 4, 3, 10, seed=1)
    optimizer = optax.adam(1e-2)

    def update(carry, u):
        w, opt = carry
        loss, grad = jax.value_and_grad(_rollout_loss)(w, u, remat=remat)
        delta, opt = optimizer.update(grad, opt)
        return (w + delta, opt), loss

    def train(w, data):
        return lax.scan(update, (w, optimizer.init(w)), data)

    _close(fast_convolutions(train)(w, data), train(w, data))
    _close(jax.jit(fast_convolutions(train))(w, data), train(w, data))


def test_checkpoint_keeps_its_barriers():
    # Single precision and real widths, so that the rule itself takes the convolutions.
    w = _array(32, 32, 3, dtype=jnp.float32) / 10
    u = _array(8, 32, 64, dtype=jnp.float32)

    def temporaries(fn):
        compiled = jax.jit(fn).lower(w, u).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def gradient(remat, length):
        def loss(w, u):
            def step(u, _):
                for _ in range(3):
                    u = jnp.tanh(lax.conv_general_dilated(u, w, (1,), "SAME"))
                return u, None

            step = jax.checkpoint(step) if remat else step
            return jnp.sum(lax.scan(step, u, length=length)[0])

        return jax.grad(loss)

    plain, remat = gradient(False, 40), gradient(True, 40)
    new = fast_convolutions(remat)
    for name in ("remat2", "checkpoint", "optimization_barrier", "scan"):
        assert _names(new, w, u).count(name) == _names(remat, w, u).count(name)
    assert {"remat2", "checkpoint"} & set(_names(new, w, u))
    assert temporaries(new) < 1.3 * temporaries(remat)
    assert temporaries(new) < 0.5 * temporaries(fast_convolutions(plain))


def test_branches_while_and_custom_rules(forced):
    forced()
    x, w = _array(3, 2, 9), _array(2, 2, 3, seed=1) / 3

    def conv(x):
        return lax.conv_general_dilated(x, w, (1,), "SAME")

    smooth_jvp = jax.custom_jvp(conv)
    smooth_jvp.defjvps(lambda t, ans, x: conv(t))
    smooth_vjp = jax.custom_vjp(conv)
    smooth_vjp.defvjp(lambda x: (conv(x), None), lambda _, g: (conv(g),))

    def fn(x, n):
        x = lax.cond(n > 2, lambda x: 2 * conv(x), jnp.tanh, x)
        x = lax.fori_loop(0, n, lambda i, x: jnp.sin(conv(x)), x)
        x = smooth_vjp(smooth_jvp(jax.jit(conv)(x)))
        return jax.checkpoint(conv)(x)

    assert len(_convolutions(fn, x, 3)) == 6
    for eqn in _convolutions(fast_convolutions(fn), x, 3):
        assert eqn.params["dimension_numbers"].out_spec == (0, 2, 1)
    for n in (1, 4):
        _close(fast_convolutions(fn)(x, n), fn(x, n))


def test_jitted_function_called_twice_stays_one(forced):
    forced()
    x, w = _array(3, 2, 9), _array(2, 2, 3, seed=1)
    conv = jax.jit(lambda x: lax.conv_general_dilated(x, w, (1,), "SAME"))
    jaxpr = jax.make_jaxpr(lambda x: conv(conv(x)))(x)
    calls = [eqn for eqn, _ in walk_equations(jaxpr) if "jaxpr" in eqn.params]
    before = {id(eqn.params["jaxpr"]) for eqn in calls}
    new = replace_equations(jaxpr, module._replacement)
    calls = [eqn for eqn, _ in walk_equations(new) if "jaxpr" in eqn.params]
    assert len({id(eqn.params["jaxpr"]) for eqn in calls}) == len(before)
    _close(fast_convolutions(lambda x: conv(conv(x)))(x), conv(conv(x)))


@pytest.mark.parametrize("form", FORMS)
def test_vmapped_models_match(form, forced):
    forced(form)
    keys = jax.random.split(jax.random.key(0), 3)
    models = eqx.filter_vmap(
        lambda key: eqx.nn.Conv1d(
            2, 4, 3, padding="SAME", padding_mode="CIRCULAR", key=key
        )
    )(keys)
    params, static = eqx.partition(models, eqx.is_array)
    u = _array(3, 5, 2, 9)

    def loss(params, u):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(u) ** 3)

    update = jax.vmap(jax.value_and_grad(loss))
    groups = {read_convolution(eqn).groups for eqn in _convolutions(update, params, u)}
    assert groups == {3}
    _close(fast_convolutions(update)(params, u), update(params, u))


def test_inside_shard_map_matches(forced):
    forced()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    w, u = _array(3, 3, 3) / 3, _array(4, 3, 10, seed=1)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    def gradient(w, u):
        grad = jax.grad(functools.partial(_rollout_loss, remat=True))
        return lax.pmean(grad(w, u), "data")

    assert len(_convolutions(jax.jit(gradient), w, u)) > 2
    _close(jax.jit(fast_convolutions(gradient))(w, u), jax.jit(gradient)(w, u))


def test_under_vmap_and_grad_matches(forced):
    forced()
    w, u = _array(3, 3, 3) / 3, _array(2, 4, 3, 10, seed=1)
    loss = functools.partial(_rollout_loss, remat=False)
    new = fast_convolutions(loss)
    for make in (lambda f: jax.vmap(f, (None, 0)), jax.jacrev):
        data = u if make is not jax.jacrev else u[0]
        _close(make(new)(w, data), make(loss)(w, data))


def test_types_structure_and_closed_over_arrays_are_kept(forced):
    forced()
    w = _array(3, 2, 3, dtype=jnp.float32)

    def fn(tree, *, scale):
        out = lax.conv_general_dilated(tree["u"], w, (1,), "SAME")
        weak = jnp.asarray(1.0) * scale
        return {
            "out": out,
            "count": tree["n"] + 1,
            "weak": 2.0 * scale,
            "s": weak,
        }, None

    tree = {"u": _array(2, 2, 8, dtype=jnp.float32), "n": jnp.int32(3)}
    old = jax.eval_shape(fn, tree, scale=0.5)
    new = jax.eval_shape(fast_convolutions(fn), tree, scale=0.5)
    assert jax.tree.structure(old) == jax.tree.structure(new)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    value = fast_convolutions(fn)(tree, scale=0.5)[0]
    np.testing.assert_allclose(value["out"], fn(tree, scale=0.5)[0]["out"], rtol=1e-5)


def test_traces_once():
    count = 0

    def fn(x):
        nonlocal count
        count += 1
        return lax.conv_general_dilated(x, x[:3], (1,), "SAME")

    run = jax.jit(fast_convolutions(fn))
    run(_array(5, 2, 8))
    run(_array(5, 2, 8, seed=1))
    assert count == 1


def test_program_without_convolutions_is_left_as_it_is():
    jaxpr = jax.make_jaxpr(lambda x: lax.scan(lambda c, _: (c + 1, c), x, length=3))(
        1.0
    )
    assert replace_equations(jaxpr, module._replacement) is jaxpr


def test_replacement_of_another_shape_is_refused():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) + 1)(jnp.ones(3))
    new = replace_equations(
        jaxpr, lambda e: jnp.sum if e.primitive.name == "sin" else None
    )
    assert [eqn.primitive.name for eqn in new.jaxpr.eqns] == ["sin", "add"]


def _forms(x_shape, w_shape, dtype, padding="VALID", **options):
    """What the rule picks for: forward, gradient by kernel, gradient by input."""

    def loss(x, w):
        strides = (1,) * (len(x_shape) - 2)
        y = lax.conv_general_dilated(x, w, strides, padding, **options)
        return jnp.sum(jnp.abs(y) ** 2)

    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x_shape, w_shape))
    found = map(read_convolution, _convolutions(jax.grad(loss, (1, 0)), x, w))
    picks = {
        "kernel" if c.is_kernel_gradient else "input" if c.is_padded else "forward": c
        for c in found
    }
    chosen = {name: choose_form(conv) for name, conv in picks.items()}
    return {name: form and form.__name__ for name, form in chosen.items()}


def test_rule_by_size():
    single, double = jnp.float32, jnp.float64
    nothing = {"forward": None, "input": None, "kernel": None}
    everything = dict.fromkeys(nothing, "channels_last")
    assert _forms((32, 1, 31), (1, 1, 2), single) == nothing
    assert _forms((20, 4, 32), (4, 4, 3), single)["forward"] is None
    assert _forms((20, 32, 162), (32, 32, 3), single) == everything
    assert _forms((8, 16, 34, 34), (16, 16, 3, 3), single) == everything
    thin = _forms((20, 12, 162), (12, 12, 3), single)
    assert thin == everything | {"kernel": "tap_products"}
    assert _forms((20, 1, 162), (32, 1, 3), single)["forward"] is None
    assert _forms((20, 32, 162), (1, 32, 3), single)["input"] == "shift_and_add"
    assert _forms((20, 32, 32, 32), (32, 32, 1, 1), single)["forward"] == "one_by_one"
    products = dict.fromkeys(nothing, "tap_products")
    assert _forms((8, 16, 34, 34), (16, 16, 3, 3), double) == products
    assert _forms((2, 8, 18, 18, 18), (8, 8, 3, 3, 3), single) == products
    grouped = _forms((20, 256, 162), (256, 32, 3), single, feature_group_count=8)
    assert set(grouped.values()) == {"grouped"}
    # Eight members of a stencil: one fused loop over all, not eight, nor masks.
    stencils = _forms((32, 8, 31), (8, 1, 2), single, feature_group_count=8)
    assert stencils == dict.fromkeys(nothing, "grouped")
    many = _forms((20, 1024, 162), (1024, 32, 3), single, feature_group_count=32)
    assert set(many.values()) == {"channels_last"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_rule_leaves_unmeasured_types(dtype):
    assert set(_forms((20, 32, 162), (32, 32, 3), dtype).values()) == {None}


def test_rule_leaves_fast_layouts():
    x, w = jnp.ones((20, 162, 32), jnp.float32), jnp.ones((3, 32, 32), jnp.float32)
    numbers = ("NWC", "WIO", "NWC")

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=numbers)

    (eqn,) = _convolutions(conv, x, w)
    assert choose_form(read_convolution(eqn)) is None
    assert inspect_loops(jax.make_jaxpr(conv)(x, w)).replaceable == 0


def test_rewriting_twice_changes_nothing_more():
    x, w = _array(20, 32, 160, dtype=jnp.float32), _array(32, 32, 3, dtype=jnp.float32)
    new = fast_convolutions(lambda x: lax.conv_general_dilated(x, w, (1,), "SAME"))
    twice = fast_convolutions(new)
    assert inspect_loops(jax.make_jaxpr(new)(x)).replaceable == 0
    assert _names(new, x) == _names(twice, x)


def test_inspection_counts():
    w = jnp.ones((32, 32, 3), jnp.float32)

    def fn(u):
        u = lax.conv_general_dilated(u, w, (1,), "SAME")

        def step(u, _):
            return lax.conv_general_dilated(u, w, (1,), "SAME"), None

        u = lax.scan(step, u, length=3)[0]
        u = lax.cond(u[0, 0, 0] > 0, lambda u: step(u, None)[0], lambda u: u, u)
        return jnp.fft.rfft(u).real

    jaxpr = jax.make_jaxpr(fn)(jnp.ones((20, 32, 160), jnp.float32))
    assert inspect_loops(jaxpr) == (3, 2, 3, 1)
    assert has_loop_convolutions(jaxpr)
    assert not has_loop_convolutions(jax.make_jaxpr(jnp.sin)(1.0))


@pytest.mark.parametrize("name", ["gpu", "tpu", "cuda", "METAL"])
def test_only_the_cpu_needs_it(name):
    assert platform_needs_it("cpu")
    assert not platform_needs_it(name)


def test_bad_arguments():
    with pytest.raises(TypeError, match="a function to rewrite, got float"):
        fast_convolutions(1.0)
    with pytest.raises(TypeError, match=r"a jaxpr, got function.*make_jaxpr"):
        inspect_loops(lambda x: x)
    with pytest.raises(TypeError, match=r"name of a platform, got .*default_backend"):
        platform_needs_it(jax.devices()[0])
