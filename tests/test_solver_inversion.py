"""Networks that invert observations, and solvers one after another."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx

S = tx.solver

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
# Layouts: class, options, shape of a window.
LAYOUTS = {
    "time": (S.ConvInversion1D, (3, {"along": "time", "patch": 2}), (12, 3)),
    "space": (
        S.ConvInversion1D,
        (4, {"along": "space", "padding": "periodic"}),
        (4, 9),
    ),
    "both": (
        S.ConvInversion1D,
        (
            1,
            {
                "along": "both",
                "kernel_size": (3, 5),
                "padding": ("zero", "periodic"),
                "patch": (4, 1),
            },
        ),
        (12, 10),
    ),
    "fields": (S.ConvInversion2D, (3, {"padding": "periodic"}), (3, 6, 8)),
    "times and fields": (S.ConvInversion2D, (1, {"along": "both"}), (4, 6, 5)),
}
layouts = pytest.mark.parametrize("name", LAYOUTS)


def _network(name, *, refine=False, seed=0):
    kind, (channels, options), shape = LAYOUTS[name]
    network = kind(
        channels, 5, depth=2, refine=refine, key=jax.random.key(seed), **options
    )
    # As after some training: the last layer of a correction starts at 0.
    last = network.layers[-1].weight
    values = 0.1 * jnp.cos(jnp.arange(last.size)).reshape(last.shape)
    return eqx.tree_at(lambda n: n.layers[-1].weight, network, values), shape


def _batch(shape, *, seed=0, count=2):
    rng = np.random.default_rng(seed)
    y, initial = (jnp.asarray(rng.normal(size=(count, *shape))) for _ in range(2))
    mask = jnp.asarray(rng.uniform(size=y.shape) < 0.6)
    kind = tx.Batch1D if len(shape) == 2 else tx.Batch2D
    return kind(jnp.where(mask, y, jnp.nan), mask, y, initial)


def _by_hand(network, y, mask, start):
    """The same sums, tap by tap with rolled or shifted arrays."""

    def convolve(layer, x):
        kernel, total = layer.weight.shape[:-2], 0.0
        for tap in np.ndindex(*kernel):
            moved = x
            for axis, (place, taps) in enumerate(zip(tap, kernel, strict=True)):
                by = place - taps // 2
                moved = jnp.roll(moved, -by, axis)
                if layer.padding[axis] == "zero":
                    index = np.arange(x.shape[axis]) + by
                    inside = (index >= 0) & (index < x.shape[axis])
                    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
                    moved = jnp.where(inside.reshape(shape), moved, 0.0)
            total = total + moved @ layer.weight[tap]
        return total + layer.bias.reshape((1,) * (x.ndim - 1) + (-1,))

    points, (first, *middle, last) = network.layout.points, network.layers
    seen = [jnp.where(mask, y, 0.0), mask.astype(float)]
    if network.refine:
        seen = [jnp.where(mask, y - start, 0.0), mask.astype(float), start]
    h = convolve(first, jnp.concatenate([points(x) for x in seen], axis=-1))
    for layer in middle:
        gelled = h / (1 + jnp.exp(-h))
        h = h + convolve(layer, gelled)
    out = network.layout.state(convolve(last, h / (1 + jnp.exp(-h))))
    return start + out if network.refine else out


@layouts
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_network_is_its_equation(name, refine, dtype):
    """Single precision takes another way than double."""
    network, shape = _network(name, refine=refine)
    batch = _batch(shape)
    network, batch = jax.tree.map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, (network, batch)
    )
    want = [
        _by_hand(network, *window)
        for window in zip(batch.input, batch.mask, batch.initial, strict=True)
    ]
    got = _jit(lambda b: network(b))(batch)
    assert got.dtype == dtype
    near = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(got, jnp.stack(want), rtol=near, atol=near)


def test_low_precision_is_that_of_the_weights():
    """Observations in half precision do not take the weights down with them."""
    network, shape = _network("time")
    network = jax.tree.map(
        lambda x: x.astype("float32") if eqx.is_inexact_array(x) else x, network
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 12)), "bfloat16")
    layer = network.layers[0]
    np.testing.assert_allclose(layer.outside_loops(x), layer(x), rtol=1e-5, atol=1e-6)
    batch = jax.tree.map(
        lambda x: x.astype("bfloat16") if x.dtype != bool else x, _batch(shape)
    )
    assert network(batch).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("patch", "kernel", "depth"), [(1, 3, 2), (4, 3, 1), (2, 5, 1)]
)
def test_a_state_depends_on_what_the_docstring_says(patch, kernel, depth):
    network = S.ConvInversion1D(
        1, 3, depth, kernel_size=kernel, patch=patch, key=jax.random.key(2)
    )
    seen = jnp.ones((1, 48, 1), bool)
    slope = jax.jacobian(lambda y: network(tx.Batch1D(y, seen))[0, :, 0])(
        jnp.ones((1, 48, 1))
    )[:, 0, :, 0]
    there = np.argwhere(np.asarray(slope) != 0)
    reach = (depth + 2) * (kernel // 2) * patch + patch - 1
    assert np.abs(there[:, 0] - there[:, 1]).max() == reach


@layouts
def test_gaps_and_what_is_not_asked_for_are_never_read(name):
    network, shape = _network(name)
    batch = _batch(shape)
    other = eqx.tree_at(
        lambda b: (b.input, b.initial),
        batch,
        (jnp.where(batch.mask, batch.input, 7.0), batch.initial + 1),
    )
    assert jnp.array_equal(network(batch), network(other))
    moved = eqx.tree_at(lambda b: b.input, batch, batch.input + 1)
    assert not jnp.allclose(network(batch), network(moved))


def test_a_ring_has_no_first_place():
    network, shape = _network("both", refine=True)
    batch = _batch(shape)
    turned = jax.tree.map(lambda x: jnp.roll(x, 3, axis=2), batch)
    np.testing.assert_allclose(
        jnp.roll(network(batch), 3, axis=2), network(turned), atol=1e-12
    )


@layouts
def test_a_correction_begins_at_nothing(name):
    kind, (channels, options), shape = LAYOUTS[name]
    network = kind(channels, 5, refine=True, key=jax.random.key(0), **options)
    batch = _batch(shape)
    assert jnp.array_equal(network(batch), batch.initial)
    start = eqx.tree_at(lambda b: b.initial, batch, None)
    assert jnp.array_equal(network(start), batch.observed())


def test_training_tends_to_the_conditional_mean():
    """x ~ N(0, 1), y = x + N(0, 1): half of what was seen, nothing where nothing was."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 1, 1)).astype(np.float32)
    y = (x + rng.normal(size=x.shape)).astype(np.float32)
    mask = rng.uniform(size=x.shape) < 0.5
    network = S.ConvInversion1D(1, 16, 1, kernel_size=1, key=jax.random.key(0))
    trainer = tx.trainer.Trainer(
        tx.Batch1D(jnp.asarray(y), jnp.asarray(mask), jnp.asarray(x)),
        tx.configuration.Reconstruction(),
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, 600)),
        num_training_steps=600,
        batch_size=500,
        progress=False,
    )
    trained, _ = trainer(network, key=jax.random.key(1))
    at = jnp.linspace(-2, 2, 9, dtype=jnp.float32)[:, None, None]
    seen = trained(tx.Batch1D(at, jnp.ones(at.shape, bool)))
    unseen = trained(tx.Batch1D(at, jnp.zeros(at.shape, bool)))
    np.testing.assert_allclose(seen, at / 2, atol=0.15)
    np.testing.assert_allclose(unseen, 0.0, atol=0.1)


def _stages():
    guess, shape = _network("time")
    correction, _ = _network("time", refine=True, seed=1)
    solver = S.FourDVarNet1D(
        S.DynamicalPrior(tx.sample_data.make_lorenz_63_stepper(0.02)),
        S.GradientDescent(0.02, learned=True), 3,
        background_weight=0.5, learn_weights=True,
    )  # fmt: skip
    return (guess, solver, correction), shape


def test_stages_run_from_each_others_states():
    (guess, solver, correction), shape = _stages()
    batch = _batch(shape)
    start = lambda x: eqx.tree_at(lambda b: b.initial, batch, x)  # noqa: E731
    first = guess(batch)
    want = correction(start(solver(start(first))))
    whole = S.Sequential([guess, solver, correction])
    np.testing.assert_allclose(whole(batch), want, atol=1e-12)
    assert jnp.array_equal(S.Sequential([guess])(batch), first)
    assert whole.prior is solver.prior
    assert not hasattr(S.Sequential([guess]), "prior")


def test_all_stages_are_differentiated():
    stages, shape = _stages()
    batch, whole = _batch(shape), S.Sequential(stages)
    parameters, static = eqx.partition(whole, eqx.is_inexact_array)
    loss = lambda p: jnp.mean((eqx.combine(p, static)(batch) - batch.target) ** 2)  # noqa: E731
    slope = _jit(jax.grad(loss))(parameters)
    rng = np.random.default_rng(3)
    # Offset and scale of a dynamical prior are constants.
    along = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), parameters)
    prior = lambda p: (p.stages[1].prior.offset, p.stages[1].prior.scale)  # noqa: E731
    along = eqx.tree_at(prior, along, replace_fn=jnp.zeros_like)
    compiled = _jit(loss)
    at = lambda h: compiled(jax.tree.map(lambda p, d: p + h * d, parameters, along))  # noqa: E731
    want = (at(1e-6) - at(-1e-6)) / 2e-6
    products = jax.tree.map(jnp.vdot, slope, along)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), want, rtol=1e-6)
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(slope.stages[0]))


def test_a_solve_of_one_step_hands_back_through_its_background_alone():
    (guess, _, _), shape = _stages()
    batch = _batch(shape)

    def slope(weight):
        solver = S.FourDVarNet1D(
            S.DynamicalPrior(tx.sample_data.make_lorenz_63_stepper(0.02)),
            S.GradientDescent(0.02), 3,
            solver_adjoint=tx.OneStepAdjoint(), background_weight=weight,
        )  # fmt: skip
        loss = lambda g: jnp.mean(S.Sequential([g, solver])(batch) ** 2)  # noqa: E731
        return eqx.filter_jit(eqx.filter_grad(loss))(guess).layers[0].weight

    assert not slope(0.0).any()
    assert slope(0.5).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _conv(kernel_size=4), "`kernel_size` to be odd"),
        (lambda: _conv(padding="mirror"), "`padding` to be 'zero'"),
        (lambda: _conv(along="depth"), "`along` to be one of"),
        (lambda: _conv(depth=0), "`depth` to be an integer >= 1"),
        (lambda: _conv(hidden_dim=0), "`hidden_dim` to be an integer >= 1"),
        (lambda: _conv(refine=1), "`refine` to be"),
        (lambda: _conv()(jnp.ones((1, 4, 2))), "to get a Batch1D, got"),
        (lambda: _conv()(_batch((4, 3))), "a state .* with 2 channels"),
        (lambda: _conv(patch=3)(_batch((4, 2))), "that patch=.* divides"),
        (
            lambda: _conv(refine=True)(
                tx.Batch1D(*(jnp.ones((1, 4, 2)),) * 2, initial=jnp.ones((1, 4, 3)))
            ),
            r"`initial` states of the observations' shape \[1, 4, 2\]",
        ),
        (lambda: S.Sequential([]), "`stages` to be functions of a batch"),
        (lambda: S.Sequential([3]), "`stages` to be functions of a batch"),
        (lambda: S.Sequential(_conv()), "`stages` to be functions of a batch"),
        (lambda: S.Sequential([_conv()])(jnp.ones(3)), "to get a batch, got"),
        (
            lambda: S.Sequential([lambda b: b.observed()[0]])(_batch((4, 2))),
            "states .* of 2 windows",
        ),
        (
            lambda: S.Sequential([lambda b: b.observed()[:, 0, 0]])(_batch((4, 2))),
            r"states .* of 2 windows, got float64\[2\]",
        ),
        (
            lambda: S.Sequential([lambda b: (b.observed(),)])(_batch((4, 2))),
            "windows, got tuple",
        ),
        (
            lambda: S.Sequential([lambda b: b.mask])(_batch((4, 2))),
            "windows, got bool",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _conv(**options):
    return S.ConvInversion1D(2, **({"key": jax.random.key(0)} | options))
