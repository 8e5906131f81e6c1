"""Simulated data: any sample alone is itself in the whole, and shares its key with none."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainax_pk as tx
from trainax_pk.data import (
    BoxUniform,
    DiffraxModel,
    ForwardModel,
    Normal,
    Observation,
    Observed,
    Parametric,
    Product,
    StepperModel,
)
from trainax_pk.data._simulation_keys import SPLITS, sample_key, stream_word
from trainax_pk.data._simulation_run import pack

DT = 0.01
# A program is compiled for every device; one test uses all of them.
ONE = jax.local_devices()[:1]
LORENZ = StepperModel(tx.sample_data.make_lorenz_63_stepper(DT), dt=DT)
CLOUD = Normal(jnp.array([1.0, 2.0, 20.0]), 4.0)


def SimulationDataset(*arguments, **options):  # noqa: N802
    return tx.data.SimulationDataset(*arguments, **{"devices": ONE, **options})


def lorenz_dataset(num_samples=21, **options):
    options = {
        "num_steps": 6,
        "stride": 2,
        "num_warmup_steps": 3,
        "block_size": 8,
    } | options
    return SimulationDataset(LORENZ, CLOUD, num_samples, **options)


@pytest.fixture(scope="module")
def dataset():
    return lorenz_dataset()


@pytest.fixture(scope="module")
def whole(dataset):
    return dataset[:]


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in leaves)


# Values


def test_a_sample_is_the_hand_made_loop_over_its_draw(whole):
    params, output = whole
    assert params.shape == (21, 3) and output.shape == (21, 4, 3)
    for i in (0, 13, 20):
        u, kept = params[i], []
        for n in range(3 + 6 + 1):
            if n >= 3 and (n - 3) % 2 == 0:
                kept.append(u)
            u = LORENZ.step(u, DT)
        np.testing.assert_allclose(output[i], np.stack(kept), rtol=1e-10)
    # Draws of the prior, by its own moments.
    many = lorenz_dataset(4000, num_steps=None, stride=1, block_size=512)[:][0]
    np.testing.assert_allclose(many.mean(0), [1, 2, 20], atol=5 * 4 / np.sqrt(4000))
    np.testing.assert_allclose(many.std(0), 4.0, rtol=0.05)


def test_stride_one_and_no_trajectory_are_parts_of_the_same(whole):
    fine = lorenz_dataset(stride=1)[:][1]
    np.testing.assert_allclose(fine[:, ::2], whole[1], rtol=1e-12)
    one = lorenz_dataset(num_steps=None, stride=1)[:][1]
    np.testing.assert_allclose(one, fine[:, 1], rtol=1e-12)


def test_plain_callable_and_chain():
    prior = Product({"a": Normal(1.0, 0.3), "b": BoxUniform([0.0, 1.0], [1.0, 3.0])})

    def forward(params):
        return {"y": params["a"] * params["b"], "norm": jnp.sum(params["b"] ** 2)}

    chain = Observed(forward, lambda out: out["y"]) | (lambda y: y[:1])
    params, output = SimulationDataset(forward, prior, 5)[:]
    np.testing.assert_allclose(output["y"], params["a"][:, None] * params["b"])
    _, seen = SimulationDataset(chain, prior, 5)[:]
    np.testing.assert_array_equal(seen, output["y"][:, :1])


def test_a_stochastic_simulator_has_a_key_of_its_own():
    # The prior draws from its own key, so that noise must not be a function of theta;
    # an observation's noise is a third, independent stream.
    draws = lambda key, theta: theta + jax.random.normal(key, theta.shape)  # noqa: E731
    prior = tx.data.Normal(jnp.zeros(1), 2.0)
    chain = tx.data.Stochastic(draws) | Observation(lambda x: x, 0.5)
    plain = SimulationDataset(tx.data.Stochastic(draws), prior, 20_000)
    theta, x = (np.asarray(a)[:, 0] for a in plain[:])
    seen = np.asarray(SimulationDataset(chain, prior, 20_000)[:][1])[:, 0]
    columns = np.stack([theta, x - theta, seen - x])  # same simulator keys in both
    expected = np.diag([4.0, 1.0, 0.25])
    np.testing.assert_allclose(np.cov(columns), expected, atol=0.12)
    assert np.array_equal(plain[7:9][1][:, 0], x[7:9])
    assert not np.isin(plain.with_split("val")[:100][1], x).any()
    with pytest.raises(ValueError, match="key"):
        chain(jnp.zeros(1))
    one = chain(jnp.zeros(1), key=jax.random.key(0))
    assert one.shape == (1,)
    assert one != chain(jnp.zeros(1), key=jax.random.key(1))


def test_parameters_of_the_physics():
    def build(params):
        stepper = lambda u: u * params["rate"]  # noqa: E731
        return StepperModel(stepper, dt=1.0), params["u0"]

    prior = Product({"rate": BoxUniform(0.5, 0.9), "u0": Normal(jnp.ones(2), 0.1)})
    dataset = SimulationDataset(Parametric(build), prior, 6, num_steps=3)
    params, output = dataset[:]
    powers = params["rate"][:, None, None] ** np.arange(4)[None, :, None]
    np.testing.assert_allclose(output, powers * params["u0"][:, None], rtol=1e-12)
    trajectories = dataset.trajectories()
    assert trajectories.num_times == 4
    np.testing.assert_array_equal(trajectories.sample["rate"], params["rate"])


def test_observation_noise_has_its_size_and_is_fresh_at_every_time():
    still = StepperModel(lambda u: u, dt=1.0)
    operator = Observation(lambda u: {"x": u[:1], "y": u}, {"x": 0.5, "y": 0.0})
    options = {"num_steps": 9, "block_size": 128}
    dataset = SimulationDataset(still, CLOUD, 400, observation=operator, **options)
    params, output = dataset[:]
    np.testing.assert_array_equal(output["y"], np.repeat(params[:, None], 10, 1))
    noise = output["x"] - params[:, None, :1]
    assert abs(noise.std() / 0.5 - 1) < 0.05
    assert abs(np.corrcoef(noise[:, 0, 0], noise[:, 1, 0])[0, 1]) < 0.2
    # Noise does not move the draw, and `|` is the same thing.
    bare = SimulationDataset(still, CLOUD, 400, **options)
    np.testing.assert_array_equal(bare[:5][0], params[:5])
    piped = SimulationDataset(still | operator, CLOUD, 400, **options)
    assert same(piped[:5], dataset[:5])
    tangent = operator.linearize(jnp.ones(3))(jnp.arange(3.0))
    np.testing.assert_array_equal(tangent["x"], [0.0])


def test_diffrax_against_the_closed_form_and_as_a_stepped_model():
    decay = lambda t, y, rate: -rate * y  # noqa: E731
    controller = diffrax.PIDController(rtol=1e-8, atol=1e-8)
    options = {"args": 2.0, "stepsize_controller": controller}
    solved = DiffraxModel(
        decay, diffrax.Tsit5(), save_times=(0.25, 0.5, 1.0), **options
    )
    stepped = DiffraxModel(diffrax.ODETerm(decay), diffrax.Tsit5(), dt=0.25, **options)
    prior = BoxUniform([1.0], [3.0])
    y0, ys = SimulationDataset(solved, prior, 4)[:]
    exact = y0[:, None] * np.exp(-2 * np.array([0.25, 0.5, 1.0]))[None, :, None]
    np.testing.assert_allclose(ys, exact, rtol=1e-6)
    assert isinstance(stepped, ForwardModel)
    _, trajectory = SimulationDataset(stepped, prior, 4, num_steps=4)[:]
    np.testing.assert_allclose(trajectory[:, [1, 2, 4]], exact, rtol=1e-6)
    # Differentiated, it takes the project's adjoints.
    fixed = {"args": 2.0, "dt0": 0.05, "adjoint": tx.RecursiveCheckpointAdjoint()}
    model = DiffraxModel(decay, diffrax.Tsit5(), dt=1.0, **fixed)
    slope = jax.grad(lambda y: model.step(y, model.dt))(jnp.array(3.0))
    np.testing.assert_allclose(slope, np.exp(-2), rtol=1e-6)
    # Too few steps are a failure of the sample, not of the program.
    starved = DiffraxModel(decay, diffrax.Tsit5(), dt=9.0, max_steps=2, **options)
    with pytest.raises(FloatingPointError, match="4 of 4 samples"):
        SimulationDataset(starved, prior, 4)[:]


# Slices


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_slice_is_the_same_rows_of_the_whole(dataset, whole, data):
    i, j = sorted(data.draw(st.tuples(*[st.integers(0, 21)] * 2)))
    assert same(dataset[i:j], jax.tree.map(lambda x: x[i:j], whole))
    rows = data.draw(st.lists(st.integers(-21, 20), min_size=1, max_size=30))
    rows = np.array(rows)
    assert same(dataset[rows], jax.tree.map(lambda x: x[rows], whole))
    assert same(dataset[int(rows[0])], jax.tree.map(lambda x: x[rows[0]], whole))


def network_dataset(**options):
    """Matrix products, whose kernels depend on the width of a batch."""
    weights = jax.random.normal(jax.random.key(1), (7, 7)) / 3
    stepper = StepperModel(lambda u: jnp.tanh(weights @ u), dt=1.0)
    return SimulationDataset(
        stepper, Normal(jnp.zeros(7), 1.0), 37, num_steps=4, block_size=4, **options
    )


def test_chunks_and_devices_change_no_bit():
    reference = network_dataset()[:]
    for options in ({"chunk_size": 5}, {"chunk_size": 36}, {"memory_budget": 4096}):
        chunks = list(network_dataset(**options).chunks())
        joined = jax.tree.map(lambda *x: np.concatenate(x), *chunks)
        assert same(joined, reference)
    # By itself it takes all of them.
    assert len(jax.local_devices()) == 4
    for devices in (jax.local_devices()[1:3], None):
        dataset = network_dataset(devices=devices)
        for rows in (
            slice(None),
            slice(5, 23),
            slice(36, 37),
            np.array([30, 2, 2, 11]),
        ):
            assert same(dataset[rows], jax.tree.map(lambda x, r=rows: x[r], reference))


def test_iteration_gives_every_pair_once(whole):
    pairs = list(lorenz_dataset(chunk_size=5))
    assert same(jax.tree.map(lambda *x: np.stack(x), *pairs), whole)


def test_one_program_for_all_slices_and_splits():
    dataset = lorenz_dataset()
    held_out = dataset.with_split("val")
    for part in (dataset, held_out):
        part[3:5], part[:], part[np.array([20, 1])]
    assert dataset._runner.num_traces == held_out._runner.num_traces == 1


@given(st.lists(st.integers(0, 99), min_size=1, max_size=60), st.integers(1, 17))
def test_packing_keeps_lanes(rows, width):
    rows = np.array(rows)
    blocks, places = pack(rows, width)
    used = places >= 0
    assert sorted(places[used]) == list(range(len(rows)))
    lanes = np.broadcast_to(np.arange(width), places.shape)
    assert (blocks[used] == rows[places[used]]).all()
    assert (blocks[used] % width == lanes[used]).all()
    assert len(blocks) == np.bincount(rows % width).max()


# Keys


def key_words(seed, split, indices, *, fresh=False):
    word = stream_word(seed, split, fresh=fresh)
    keys = jax.vmap(lambda i: sample_key(word, i))(jnp.asarray(indices, jnp.uint32))
    return {tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_two_streams_share_a_key(data):
    seeds = st.integers(0, 2**29 - 1) | st.integers(0, 40)
    streams = st.tuples(seeds, st.sampled_from(SPLITS), st.booleans())
    first = data.draw(streams)
    second = data.draw(streams.filter(lambda other: other != first))
    indices = np.concatenate([np.arange(200), 2**31 - 1 - np.arange(100)])
    a, b = (key_words(s, p, indices, fresh=f) for s, p, f in (first, second))
    assert len(a) == len(b) == len(indices)
    assert not a & b


def test_neighbouring_seeds_and_splits_share_nothing():
    """Seeds that are added to indices would share all but one sample."""
    seen = set()
    for seed in range(6):
        for split in SPLITS:
            words = key_words(seed, split, np.arange(500))
            assert len(words) == 500 and not words & seen
            seen |= words


def test_samples_are_those_of_their_key_alone(dataset, whole):
    held_out = dataset.with_split("val")
    other = lorenz_dataset(seed=1)
    values = {x.tobytes() for part in (dataset, held_out, other) for x in part[:][0]}
    assert len(values) == 3 * 21
    assert same(held_out.with_split("train")[:], whole)
    # Growing a dataset keeps what was there.
    assert same(lorenz_dataset(40)[:21], whole)


# Failures


def grows(u):
    return u * jnp.where(u > 1.0, jnp.inf, 1.0)


def failing(policy, num_samples=64, **options):
    model = StepperModel(grows, dt=1.0)
    prior = BoxUniform([0.0], [2.0])
    return SimulationDataset(
        model, prior, num_samples, num_steps=2, on_failure=policy, **options
    )


def test_failures_are_kept_masked_resampled_or_refused():
    kept, masked = failing("keep"), failing("mask")
    params, output = kept[:]
    bad = params[:, 0] > 1.0
    assert 10 < bad.sum() < 54
    assert (np.isfinite(output).all((1, 2)) == ~bad).all()
    assert np.isfinite(output[:, 0]).all() and kept.num_failed == bad.sum()
    simulated = masked.simulate(slice(None))
    np.testing.assert_array_equal(simulated.failed, bad)
    assert np.isnan(simulated.output[bad]).all() and masked.num_failed == bad.sum()
    np.testing.assert_array_equal(simulated.output[~bad], output[~bad])

    resampled = failing("resample", max_attempts=20)
    again = resampled.simulate(slice(None))
    assert resampled.num_failed == (again.attempts - 1).sum() >= bad.sum()
    assert (again.params <= 1.0).all() and not again.failed.any()
    assert (again.attempts > 1).sum() == bad.sum()
    # What did not fail is what it was.
    np.testing.assert_array_equal(again.params[~bad], params[~bad])

    first = np.flatnonzero(bad)[:8].tolist()
    with pytest.raises(FloatingPointError, match=f"{bad.sum()} of 64.*") as error:
        failing("raise")[:]
    assert str(first) in str(error.value)
    with pytest.raises(FloatingPointError, match="after 2 draws each"):
        failing("resample", max_attempts=2)[:]


def test_divergence_is_a_failure():
    blows_up = StepperModel(lambda u: 10 * u, dt=1.0)
    prior = BoxUniform([0.5], [1.5])
    options = {"num_steps": 2, "divergence_limit": 100.0, "on_failure": "mask"}
    simulated = SimulationDataset(blows_up, prior, 8, **options).simulate(slice(8))
    np.testing.assert_array_equal(simulated.failed, simulated.params[:, 0] > 1.0)
    assert simulated.failed.any() and not simulated.failed.all()


@pytest.mark.parametrize("policy", ["raise", "mask"])
def test_nan_everywhere_is_an_error(policy):
    nan = SimulationDataset(
        lambda u: u * jnp.nan, Normal(0.0, 1.0), 32, on_failure=policy
    )
    with pytest.raises(FloatingPointError, match="32 of 32 samples"):
        nan[:]
    few = SimulationDataset(
        lambda u: u * jnp.nan, Normal(0.0, 1.0), 3, on_failure=policy
    )
    with pytest.raises(FloatingPointError, match="3 of 3 samples"):
        few[:]


def test_rows_that_all_failed_by_chance_are_given():
    dataset = failing("mask")
    rows = np.flatnonzero(dataset.simulate(slice(None)).failed)[:17]
    assert len(rows) == 17 and np.isnan(dataset[rows][1]).all()


# On the fly


def test_batches_made_in_the_step_are_samples_of_the_fresh_stream():
    dataset = lorenz_dataset(None, on_the_fly=True)
    windows = dataset.windows()
    indices = np.array([5, 2**31 - 2, 0])
    batch = jax.jit(windows.gather)(windows.arrays, indices)
    np.testing.assert_allclose(batch.state, dataset[indices][1], rtol=1e-9)
    assert batch.sample is None and len(windows) == len(dataset) == 2**31 - 1
    assert not np.isin(dataset[:5][0], lorenz_dataset()[:][0]).any()
    pairs = SimulationDataset(jnp.sin, Normal(0.0, 1.0), on_the_fly=True).windows()
    theta, x = pairs.gather(pairs.arrays, jnp.arange(3))
    np.testing.assert_allclose(x, jnp.sin(theta))


def train_on_the_fly(program):
    decay = StepperModel(lambda u: jnp.roll(u, 1) * 0.8, dt=1.0)
    dataset = SimulationDataset(
        decay, Normal(jnp.zeros(4), 1.0), num_steps=1, on_the_fly=True
    )
    model = eqx.nn.Linear(4, 4, use_bias=False, key=jax.random.key(0))
    optimizer = optax.adam(3e-2)
    windows = dataset.windows()
    engine = tx.engine.Engine(
        tx.make_train_step(tx.configuration.Supervised(), optimizer),
        tx.engine.make_feed(windows), num_updates=300, program=program,
    )  # fmt: skip
    state = tx.TrainState.create(model, optimizer, key=jax.random.key(1))
    order = tx.data.ShuffledOrder(len(windows), 16, 0)
    state, records = engine.run(state, order, 0, 300, 300)
    return state.model, records["loss"]


def test_training_on_fresh_simulations_learns_the_model():
    model, loss = train_on_the_fly("scan")
    assert loss.shape == (300,) and float(loss[-1]) < 1e-4 * float(loss[0])
    exact = 0.8 * jnp.roll(jnp.eye(4), 1, axis=0)
    np.testing.assert_allclose(model.weight, exact, atol=0.02)
    # Every batch is new: the first losses of an untrained model all differ.
    assert len(set(np.asarray(loss[:20]).tolist())) == 20


def test_a_trainer_takes_datasets_as_they_are():
    decay = StepperModel(lambda u: jnp.roll(u, 1) * 0.8, dt=1.0)
    prior, options = Normal(jnp.zeros(4), 1.0), {"num_steps": 2}
    model = eqx.nn.Linear(4, 4, use_bias=False, key=jax.random.key(0))
    fresh = SimulationDataset(decay, prior, on_the_fly=True, **options)
    finite = SimulationDataset(decay, prior, 40, **options)

    def train(data, steps=2, **more):
        trainer = tx.trainer.Trainer(
            data, tx.configuration.Supervised(steps), optimizer=optax.adam(3e-2),
            num_training_steps=150, batch_size=16, progress=False, **more,
        )  # fmt: skip
        return trainer(model, key=jax.random.key(1))

    for data in (fresh, finite):
        trained, history = train(data)
        assert float(history.loss[-1]) < 0.01 * float(history.loss[0])
    by_hand, _ = train(finite.trajectories())
    np.testing.assert_array_equal(by_hand.weight, trained.weight)
    with pytest.raises(ValueError, match="simulations of 2 times.*got 3"):
        train(fresh, steps=1)
    with pytest.raises(ValueError, match="window_stride=1"):
        train(fresh, window_stride=2)


def test_an_emulator_replaces_the_model_that_it_was_trained_on():
    model, _ = train_on_the_fly("loop")
    prior = Normal(jnp.zeros(4), 1.0)
    physics = StepperModel(lambda u: jnp.roll(u, 1) * 0.8, dt=1.0)
    emulator = StepperModel(model, dt=1.0)
    assert isinstance(emulator, ForwardModel)
    outputs = [
        SimulationDataset(m | Observation(lambda u: u[:2]), prior, 8, num_steps=5)[:]
        for m in (physics, emulator)
    ]
    assert same(outputs[0][0], outputs[1][0])
    error = np.abs(outputs[0][1] - outputs[1][1]).max()
    assert 0 < error < 0.05


# Bad input

WIDE = Normal(jnp.zeros(5), 1.0)
SIGNED = StepperModel(
    jnp.sin, dt=0.1, state_signature=jax.ShapeDtypeStruct((3,), float)
)
NOISY = jax.random.normal
REFUSED = [
    (lambda: lorenz_dataset(0), "`num_samples` to be an integer >= 1, got 0"),
    (lambda: lorenz_dataset(-3), "`num_samples`"),
    (lambda: lorenz_dataset(None), "`num_samples`"),
    (lambda: lorenz_dataset(2**31), "`num_samples` <= 2147483647"),
    (lambda: lorenz_dataset(5, on_the_fly=True), "num_samples=None with on_the_fly"),
    (lambda: lorenz_dataset(stride=4), "`stride` to divide `num_steps`, got 4 and 6"),
    (lambda: lorenz_dataset(num_steps=None), "stride=1 without `num_steps`"),
    (lambda: lorenz_dataset(num_warmup_steps=-1), "`num_warmup_steps`"),
    (lambda: lorenz_dataset(seed=-1), "`seed`"),
    (lambda: lorenz_dataset(seed=2**29), "`seed` < 536870912"),
    (lambda: lorenz_dataset(split="dev"), "'train', 'val' or 'test', got 'dev'"),
    (lambda: lorenz_dataset(on_failure="drop"), "`on_failure`"),
    (lambda: lorenz_dataset(divergence_limit=0.0), "`divergence_limit` > 0"),
    (lambda: lorenz_dataset(max_attempts=0), "`max_attempts`"),
    (lambda: lorenz_dataset(memory_budget=100), "memory budget of at least"),
    (lambda: lorenz_dataset(block_size=0), "`block_size`"),
    (lambda: lorenz_dataset().windows(), "on_the_fly=True"),
    (lambda: lorenz_dataset(None, on_the_fly=True).trajectories(), "finite dataset"),
    (lambda: SimulationDataset(LORENZ, 3.0, 4), r"prior with `sample\(key\)`"),
    (lambda: SimulationDataset(3.0, CLOUD, 4), "Expected a forward model, got 3.0"),
    # A prior and a model that do not fit: both shapes are told.
    (lambda: SimulationDataset(LORENZ, WIDE, 4), r"float64\[5\].*\(3,\), got \(5,\)"),
    (lambda: SimulationDataset(SIGNED, WIDE, 4), r"signature.*float64\[3\].*\[5\]"),
    (
        lambda: SimulationDataset(lambda u: u[:2], CLOUD, 4, num_steps=2),
        r"takes \(state: float64\[3\]\), got \(state: float64\[2\]\)",
    ),
    (lambda: SimulationDataset(lambda u: None, CLOUD, 4), "returns arrays"),
    (lambda: StepperModel(3.0, dt=1.0), "`stepper` to be callable"),
    (lambda: StepperModel(jnp.sin, dt=0.0), "`dt` to be a number > 0"),
    (lambda: LORENZ.step(jnp.ones(3), 0.02), "dt=0.01, the step that"),
    (lambda: Observed(3.0, jnp.sin), "forward model or a callable"),
    (lambda: Observed(jnp.sin, None), "`observe` to be callable"),
    (lambda: Observation(jnp.sin, -1.0), "`noise_std` >= 0"),
    (lambda: Observation(3.0), "`operator` to be callable"),
    (lambda: Parametric(None), "`build` to be callable"),
    (lambda: tx.data.Stochastic(None), "`simulate` to be callable"),
    (
        lambda: SimulationDataset(tx.data.Stochastic(NOISY), CLOUD, 4, num_steps=2),
        "without steps, got num_steps=2",
    ),
    (lambda: DiffraxModel(grows, diffrax.Tsit5(), dt0=0.1), "exactly one of"),
    (lambda: DiffraxModel(grows, diffrax.Tsit5(), dt=1.0), "`dt0` for constant steps"),
    (
        lambda: DiffraxModel(
            grows, diffrax.Tsit5(), dt=1.0, dt0=0.1, adjoint=tx.KStepAdjoint(2)
        ),
        "adjoint of the ODE layer",
    ),
    (
        lambda: DiffraxModel(grows, diffrax.Tsit5(), save_times=(1.0, 0.5), dt0=0.1),
        "increasing times",
    ),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_indices_outside_are_errors(dataset):
    with pytest.raises(IndexError, match=r"in \[-21, 21\), got 21"):
        dataset[21]
    with pytest.raises(TypeError, match="float64"):
        dataset[np.array([0.5])]
    assert dataset[5:5][1].shape == (0, 4, 3)


def test_a_stochastic_simulator_that_is_built_per_sample_has_no_steps():
    """One key for all steps would repeat its noise."""
    walk = tx.data.Stochastic(lambda key, u: u + jax.random.normal(key, u.shape))
    built = tx.data.Parametric(lambda p: (walk, p))
    prior = tx.data.Normal(jnp.zeros(2), 1.0)
    for steps in ({"num_steps": 5}, {"num_warmup_steps": 2}):
        with pytest.raises(ValueError, match="Stochastic simulator without steps"):
            tx.data.SimulationDataset(built, prior, 3, **steps)[:1]
    assert tx.data.SimulationDataset(built, prior, 3)[:3][1].shape == (3, 2)
