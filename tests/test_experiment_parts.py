"""Each kind builds what it names, and each field of it matters."""

import functools
import inspect
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainax_pk as tx
from trainax_pk import experiment
from trainax_pk.experiment._schedule import Clock

CLOCK = Clock(total=40, per_epoch=8.0)
STEPS = np.arange(41)


def make(family, kind, **fields):
    return experiment.kinds_of(family)[kind](**fields)


def _cosine(n, peak, least, length):
    share = np.clip(n / length, 0, 1)
    return least + (peak - least) * 0.5 * (1 + np.cos(np.pi * share))


def _triangle(n, period, shift=0.0):
    phase = (n + shift) / period
    return 1 - np.abs(2 * (phase - np.floor(phase)) - 1), np.floor(phase)


P = 0.3
FORMULAS = {
    "constant": ({}, lambda n: np.full(n.shape, P)),
    "linear": (
        {"duration": 2.0, "unit": "epochs", "minimum_ratio": 0.1},
        lambda n: P * (1 - 0.9 * np.clip(n / 16, 0, 1)),
    ),
    "cosine": ({"minimum_ratio": 0.2}, lambda n: _cosine(n, P, 0.2 * P, 40)),
    "exponential": (
        {"rate": 0.5, "period": 7.0, "minimum_ratio": 0.05},
        lambda n: np.maximum(P * 0.5 ** (n / 7), 0.05 * P),
    ),
    "polynomial": (
        {"power": 3.0, "duration": 20.0, "minimum_ratio": 0.25},
        lambda n: P * (0.25 + 0.75 * (1 - np.clip(n / 20, 0, 1)) ** 3),
    ),
    "step": (
        {"factor": 0.5, "period": 1.0, "unit": "epochs", "minimum_ratio": 0.1},
        lambda n: np.maximum(P * 0.5 ** (n // 8), 0.1 * P),
    ),
    "multistep": (
        {"factor": 0.1, "milestones": (5.0, 30.0), "minimum_ratio": 0.02},
        lambda n: np.maximum(P * 0.1 ** ((n >= 5).astype(int) + (n >= 30)), 0.02 * P),
    ),
    "cyclic": (
        {"period": 10.0, "decay": 0.5, "minimum_ratio": 0.1},
        lambda n: P * (0.1 + 0.9 * _triangle(n, 10)[0] * 0.5 ** _triangle(n, 10)[1]),
    ),
    "one_cycle": (
        {"duration": 30.0, "rise": 0.4, "div_factor": 10.0, "final_div_factor": 100.0},
        lambda n: np.where(
            n < 12,
            _cosine(12 - n, P, P / 10, 12),
            _cosine(n - 12, P, P / 1000, 18),
        ),
    ),
    "warmup_stable_decay": (
        {"decay": 1.5, "unit": "epochs", "shape": "sqrt", "minimum_ratio": 0.1},
        lambda n: P * (0.1 + 0.9 * (1 - np.sqrt(np.clip((n - 28) / 12, 0, 1)))),
    ),
}


def _values(schedule):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(STEPS)))


@pytest.mark.parametrize("kind", FORMULAS)
def test_schedules_are_their_formulas_under_jit(kind):
    fields, formula = FORMULAS[kind]
    found = _values(make("schedule", kind, peak=P, **fields).build(CLOCK))
    expected = formula(STEPS.astype(float))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", sorted(set(FORMULAS) - {"one_cycle"}))
def test_warm_up_climbs_and_hands_over_at_the_peak(kind):
    fields, _ = FORMULAS[kind]
    fields = fields | {"unit": "steps", "warmup": 6.0}
    found = _values(make("schedule", kind, peak=P, **fields).build(CLOCK))
    np.testing.assert_allclose(found[:7], P * np.arange(7) / 6, rtol=1e-6)


def test_every_schedule_has_a_formula():
    assert set(experiment.kinds_of("schedule")) == set(FORMULAS)


RATE = 0.05
OPTAX = {
    "adam": ({"b1": 0.8}, lambda: optax.adam(RATE, 0.8)),
    "adamw": (
        {"weight_decay": 0.1},
        lambda: optax.adamw(RATE, weight_decay=0.1),
    ),
    "nadam": ({"b2": 0.9}, lambda: optax.nadam(RATE, b2=0.9)),
    "radam": ({"threshold": 2.0}, lambda: optax.radam(RATE, threshold=2.0)),
    "lamb": ({"weight_decay": 0.1}, lambda: optax.lamb(RATE, weight_decay=0.1)),
    "lion": ({"b1": 0.7}, lambda: optax.lion(RATE, b1=0.7)),
    "sgd": (
        {"momentum": 0.9, "nesterov": True},
        lambda: optax.sgd(RATE, 0.9, nesterov=True),
    ),
    "rmsprop": ({"centered": True}, lambda: optax.rmsprop(RATE, centered=True)),
    "adagrad": ({"eps": 1e-3}, lambda: optax.adagrad(RATE, eps=1e-3)),
    "muon": ({"beta": 0.9}, lambda: optax.contrib.muon(RATE, beta=0.9)),
    "lbfgs": ({"memory_size": 3}, lambda: optax.lbfgs(RATE, 3, linesearch=None)),
}
PARAMS = {"w": jnp.array([[0.3, -1.2], [0.7, 2.0]]), "b": jnp.array([0.5, -0.4])}


def _cost(params):
    return jnp.sum((params["w"] @ params["b"] - 1.0) ** 2) + jnp.sum(params["b"] ** 4)


def _path(optimizer, num_steps=4):
    @jax.jit
    def update(params, state):
        value, grads = jax.value_and_grad(_cost)(params)
        extra = {"value": value, "grad": grads, "value_fn": _cost}
        optimizer_ = optax.with_extra_args_support(optimizer)
        updates, state = optimizer_.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(num_steps):
        params, state = update(params, state)
    return np.concatenate([x.ravel() for x in jax.tree.leaves(params)])


def _answers(optimizer, num_steps=8):
    """Updates to a given series of gradients, of changing sign and size."""
    rng, params = np.random.default_rng(0), PARAMS
    state, found = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(num_steps):
        size = 10.0 ** rng.uniform(-2, 1)
        grads = jax.tree.map(lambda x, s=size: s * rng.normal(size=x.shape), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found += [x.tolist() for x in jax.tree.leaves(updates)]
    return found


def _built(kind, **fields):
    return make("optimizer", kind, **({"learning_rate": RATE} | fields)).build(CLOCK)


@pytest.mark.parametrize("kind", OPTAX)
def test_optimizers_are_those_of_optax(kind):
    fields, reference = OPTAX[kind]
    np.testing.assert_allclose(
        _path(_built(kind, **fields)), _path(reference()), rtol=1e-6
    )


def test_every_optimizer_is_compared():
    assert set(experiment.kinds_of("optimizer")) == set(OPTAX)


def test_clipping_and_masked_decay():
    clipped = optax.chain(
        optax.clip(0.5), optax.clip_by_global_norm(0.6), optax.sgd(RATE)
    )
    found = _path(_built("sgd", clip_value=0.5, clip_norm=0.6))
    np.testing.assert_allclose(found, _path(clipped), rtol=1e-6)
    mask = {"w": True, "b": False}
    expected = _path(optax.adamw(RATE, weight_decay=0.3, mask=mask))
    found = _path(_built("adamw", weight_decay=0.3, decayed="matrices"))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_lbfgs_searches_a_line_by_itself():
    found = _path(make("optimizer", "lbfgs").build(CLOCK))
    np.testing.assert_allclose(found, _path(optax.lbfgs()), rtol=1e-6)


def test_a_schedule_drives_an_optimizer():
    rate = make("schedule", "linear", peak=RATE)
    expected = _path(optax.sgd(optax.linear_schedule(RATE, 0.0, 40)))
    np.testing.assert_allclose(
        _path(_built("sgd", learning_rate=rate)), expected, rtol=1e-6
    )


# Another value for every field; by kind where one value will not do for all.
OTHER = {
    "peak": 0.4, "unit": "epochs", "warmup": 3.0, "duration": 11.0, "minimum_ratio": 0.37,
    "rate": 0.81, "period": 5.0, "staircase": True, "power": 2.2, "factor": 0.77,
    "milestones": (4.0,), "decay": 0.6, "rise": 0.21, "div_factor": 7.0,
    "final_div_factor": 33.0, "shape": "cosine", "learning_rate": 0.02,
    "clip_value": 0.01, "clip_norm": 0.01, "b1": 0.6, "b2": 0.7, "eps": 0.1,
    "weight_decay": 0.4, "decayed": "matrices", "threshold": 1.5, "momentum": 0.4,
    "nesterov": True, "centered": True, "initial_accumulator": 1.3, "beta": 0.5,
    "memory_size": 1, "checkpoints": 2, "k": 3, "width": 5, "depth": 4,
    "activation": "tanh", "hidden_channels": 6, "kernel_size": 5, "border": "dirichlet",
    "num_blocks": 3, "norm": True, "dilation_rates": (1, 2), "num_levels": 1,
    "num_modes": 3, "num_rollout_steps": 3, "loss": "mae", "cut_bptt": True,
    "cut_bptt_every": 2, "time_level_weights": (0.2, 0.3), "num_branch_steps": 2,
    "cut_div_chain": True, "branch_level_weights": (0.7,), "num_post_physics_steps": 2,
    "std": 0.9, "num_steps": 2, "lengths": (2, 1), "every": 7, "use_ema": True,
    "horizon": 2, "cut_prev": True, "cut_next": True, "gradient_weight": 0.4,
    "prior_weight": 0.3, "target_prior_weight": 0.2, "head": "diagonal_gaussian",
    "num_features": 5, "hidden_dim": 3, "learn_weights": True, "residual": False,
    "periodic": False, "sigma_data": 0.5, "log_sigma_mean": 0.3, "log_sigma_std": 0.7,
    "sigma": 0.2, "time_exponent": 1.5, "sigma_min": 0.1, "sigma_max": 9.0, "rho": 3.0,
    "churn": 4.0, "name": "events", "experiment": "fluids", "uri": "file:///elsewhere",
    "project": "fluids", "mode": "offline", "churn_range": (0.1, None),
    "churn_noise": 1.1, "next_step": True,
}  # fmt: skip
NEEDED = {
    "exponential": {"rate": 0.5, "period": 7.0},
    "step": {"factor": 0.5, "period": 7.0},
    "multistep": {"factor": 0.5, "milestones": (9.0,)},
    "cyclic": {"period": 9.0},
    "warmup_stable_decay": {"decay": 4.0},
    "k_step": {"k": 2},
    "curriculum": {"lengths": (1, 2), "milestones": (9.0,)},
    "pushforward": {"num_steps": 1},
    "input_noise": {"std": 0.1},
}
# Fields that matter only beside others.
BESIDE = {
    ("exponential", "unit"): {"period": 2.0},
    ("step", "unit"): {"period": 2.0},
    ("cyclic", "unit"): {"period": 2.0},
    ("constant", "unit"): {"warmup": 1.0},
    ("linear", "unit"): {"duration": 2.0},
    ("cosine", "unit"): {"duration": 2.0},
    ("polynomial", "unit"): {"duration": 2.0},
    ("one_cycle", "unit"): {"duration": 2.0},
    ("multistep", "unit"): {"milestones": (2.0,)},
    ("warmup_stable_decay", "unit"): {"decay": 2.0},
    ("exponential", "minimum_ratio"): {"rate": 0.1},
    ("step", "minimum_ratio"): {"factor": 0.1},
    ("multistep", "minimum_ratio"): {"factor": 0.1},
    ("sgd", "nesterov"): {"momentum": 0.5},
    ("adamw", "decayed"): {"weight_decay": 0.4},
    ("lamb", "decayed"): {"weight_decay": 0.4},
    ("lion", "decayed"): {"weight_decay": 0.4},
    ("muon", "nesterov"): {},
}
VALUES = {("muon", "nesterov"): False, ("dilated_resnet", "norm"): False,
          ("unet", "norm"): False, ("rmsprop", "decay"): 0.6,
          ("warmup_stable_decay", "decay"): 9.0}  # fmt: skip


def _inner(kind):
    needs = kind in ("input_noise", "pushforward", "curriculum")
    inner = make("configuration", "supervised", num_rollout_steps=2)
    return {"configuration": inner} if needs else {}


def _show_configuration(spec):
    built = spec.build(lambda u: 0.5 * u, lambda num_times: CLOCK)
    text = eqx.tree_pformat(built, short_arrays=False)
    # A schedule prints as a function: its values tell.
    schedule = getattr(built, "schedule", None)
    return text, None if schedule is None else _values(schedule).tolist()


def _form(spec):
    key = jax.random.key(0)
    if spec.needs == "pairs":
        prior = tx.data.BoxUniform([0.0, 0.0, 1.0], [1.0, 2.0, 3.0])
        # Bounds of a prior are looked at when it is built: no tracers.
        return spec.build((1, 16), key, prior=prior)
    return eqx.filter_eval_shape(spec.build, (1, 16), key)


SHOW = {
    "schedule": lambda spec: _values(spec.build(CLOCK)).tolist(),
    "optimizer": lambda spec: _answers(spec.build(CLOCK)),
    "adjoint": lambda spec: repr(spec.build()),
    "model": lambda spec: eqx.tree_pformat(_form(spec)),
    "configuration": _show_configuration,
    "generator": lambda spec: repr(spec.build()),
    "tracker": lambda spec: repr((type(spec.build()), vars(spec.build()))),
}  # fmt: skip


def _fields():
    for family in SHOW:
        for kind, cls in experiment.kinds_of(family).items():
            for field in cls.model_fields:
                if (
                    field not in ("kind", "configuration")
                    and kind != "one_linear_layer"
                ):
                    yield family, kind, field


@pytest.mark.parametrize(("family", "kind", "field"), list(_fields()))
def test_every_field_changes_what_is_built(family, kind, field):
    if (kind, field) == ("one_cycle", "warmup"):
        with pytest.raises(ValueError, match="0"):
            make(family, kind, peak=P, warmup=3)
        return
    fields = NEEDED.get(kind, {}) | BESIDE.get((kind, field), {}) | _inner(kind)
    if family == "schedule":
        fields = {"peak": P} | fields
    if family == "optimizer":
        fields = {"learning_rate": RATE} | fields
    if kind == "diverted_chain":
        fields |= {"num_rollout_steps": 2}
    if kind == "fno":
        fields |= {"num_modes": 5}
    if field == "time_level_weights":
        fields |= {"num_rollout_steps": 1 if kind == "mix_chain" else 2}
    if field in ("adjoint", "solver_adjoint"):
        other = make("adjoint", "k_step", k=1)
    else:
        other = VALUES.get((kind, field), OTHER.get(field))
    before = _shown(make(family, kind, **fields))
    after = _shown(make(family, kind, **(fields | {field: other})))
    assert before != after


@functools.cache
def _shown(spec):
    return SHOW[spec.family](spec)


def test_every_field_of_a_system_is_an_argument():
    for kind, cls in experiment.kinds_of("data").items():
        if not hasattr(cls, "make"):
            continue
        arguments = set(inspect.signature(cls.make).parameters) - {"key"}
        own = {"kind", "data_seed", "split"}
        assert set(cls.model_fields) - own == arguments, kind
        assert set(inspect.signature(cls.make_stepper).parameters) <= arguments
        defaults = inspect.signature(cls.make).parameters
        for name in arguments:
            assert cls.model_fields[name].default == defaults[name].default, (
                kind,
                name,
            )


def test_a_system_is_that_of_sample_data():
    fields = {"num_samples": 10, "temporal_horizon": 4, "num_points": 12, "cfl": 0.5}
    spec = make("data", "advection_1d", data_seed=3, **fields)
    split = spec.build()
    key, cut = jax.random.split(jax.random.key(3))
    whole = tx.sample_data.advection_1d_periodic(**fields, key=key)
    expected = tx.data.split_by_trajectory(whole, (0.8, 0.1, 0.1), key=cut)
    assert np.array_equal(split.train.state, expected.train.state)
    u = split.train.state[0]
    assert spec.state_shape() == u.shape[1:]
    np.testing.assert_allclose(spec.stepper()(u[0]), u[1], rtol=1e-12)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_of_a_file(tmp_path, suffix):
    array = np.random.default_rng(0).normal(size=(10, 4, 3))
    path = tmp_path / f"states{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez(path, state=array)
    spec = make("data", "arrays", path=str(path), shape=array.shape)
    found = np.concatenate([part.state for part in spec.build()])
    assert sorted(found[:, 0, 0]) == sorted(array[:, 0, 0])
    assert spec.state_shape() == (3,) and spec.stepper() is None
    with pytest.raises(ValueError, match=r"Expected shape \(9, 4, 3\)"):
        make("data", "arrays", path=str(path), shape=(9, 4, 3)).build()
    with pytest.raises(ValueError, match="found no such file"):
        make("data", "arrays", path="nowhere.npy", shape=array.shape).build()
    if suffix == ".npz":
        with pytest.raises(ValueError, match="found \\['state'\\]"):
            make("data", "arrays", path=str(path), shape=array.shape, name="u").build()


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    path = tmp_path / "bad.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        make("data", "arrays", path=str(path), shape=(1, 1, 1)).build()


@pytest.mark.parametrize("kind", ["conv", "resnet", "dilated_resnet", "unet", "fno"])
@pytest.mark.parametrize("shape", [(1, 16), (2, 16, 16)])
def test_grid_models_map_states_to_states(kind, shape):
    modes = {"num_modes": 4} if kind == "fno" else {}
    spec = make("model", kind, hidden_channels=2, **modes)
    model = eqx.filter_eval_shape(spec.build, shape, jax.random.key(0))
    out = eqx.filter_eval_shape(model, jax.ShapeDtypeStruct(shape, jnp.float64))
    assert out.shape == shape


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match="Expected states \\(channels, \\*space\\)"):
        make("model", "conv").build((3,), jax.random.key(0))
    with pytest.raises(ValueError, match="multiples of 2\\^4 points"):
        make("model", "unet").build((1, 30), jax.random.key(0))
    with pytest.raises(ValueError, match="at most 9 modes for 16 points"):
        make("model", "fno").build((1, 16), jax.random.key(0))
    with pytest.raises(ValueError, match="whose stepper is known for `mix_chain`"):
        make("configuration", "mix_chain").build(None, lambda num_times: CLOCK)
    with pytest.raises(ValueError, match="odd number of taps"):
        make("model", "conv", kernel_size=4)
    with pytest.raises(ValueError, match="one milestone between two lengths"):
        make("configuration", "curriculum", lengths=(1, 2, 3), milestones=(4.0,),
             **_inner("curriculum"))  # fmt: skip


def test_the_curriculum_follows_its_milestones():
    fields = {"lengths": (1, 2), "milestones": (1.5,), "unit": "epochs"}
    spec = make("configuration", "curriculum", **fields, **_inner("curriculum"))
    lengths = _values(spec.build(None, lambda num_times: CLOCK).schedule)
    np.testing.assert_array_equal(lengths, np.where(STEPS < 12, 1, 2))
    assert math.isclose(CLOCK.updates(1.5, "epochs"), 12)


GRID = {
    "kind": "burgers_1d",
    "num_points": 16,
    "num_samples": 10,
    "temporal_horizon": 4,
}
DATA = {
    "observations": (
        {"system": {"kind": "lorenz_63", "num_samples": 10, "temporal_horizon": 8}},
        {"system": {"kind": "lorenz_63", "num_samples": 10, "temporal_horizon": 9},
         "every": 3, "noise_std": 0.2, "scale": 5.0, "data_seed": 1,
         "split": [0.6, 0.2, 0.2]},
    ),
    "lorenz_63_parameters": (
        {"num_samples": 10},
        {"num_samples": 20, "num_times": 4, "every": 2, "dt": 0.02, "data_seed": 1,
         "sigma": [9.0, 10.0], "rho": [25.0, 26.0], "beta": [2.0, 2.1],
         "noise_std": 0.1, "num_warmup_steps": 3, "split": [0.6, 0.2, 0.2]},
    ),
    "downscaling": (
        {"system": GRID},
        {"system": GRID | {"diffusivity": 0.1}, "factor": 2, "subsample": 2, "every": 2,
         "data_seed": 1, "split": [0.6, 0.2, 0.2]},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
def test_every_field_of_samples_changes_them(kind):
    fields, others = DATA[kind]
    assert set(others) == set(experiment.kinds_of("data")[kind].model_fields) - {"kind"}
    before = _sampled(kind, fields)
    for name, value in others.items():
        assert _sampled(kind, fields | {name: value}) != before, name


def _sampled(kind, fields):
    spec = experiment.kinds_of("data")[kind].model_validate_json(json.dumps(fields))
    train = spec.build().train
    return [x.tolist() for x in jax.tree.leaves(train.arrays)]


def test_samples_are_disjoint_and_mean_what_they_say():
    spec = make("data", "lorenz_63_parameters", num_samples=20, noise_std=0.0)
    parts = [part.arrays for part in spec.build()]
    assert [len(p.theta) for p in parts] == [16, 2, 2]
    assert len(np.unique(np.concatenate([p.theta for p in parts]), axis=0)) == 20
    theta, x = parts[0].theta[0], parts[0].x[0]
    assert x.shape == spec.state_shape() == (20, 3)
    stepper = tx.sample_data.make_lorenz_63_stepper(
        0.01, sigma=float(theta[0]), rho=float(theta[1]), beta=float(theta[2])
    )
    states = tx.rollout(stepper, jnp.ones(3), 150)
    np.testing.assert_allclose(x, states[50::5], rtol=1e-8)
    windows = make(
        "data", "observations", noise_std=0.0, every=3, scale=2.0,
        system=make("data", "lorenz_63", num_samples=10, temporal_horizon=8),
    )  # fmt: skip
    batch = windows.build().train.arrays
    assert batch.mask[:, ::3].all() and batch.mask.sum() == batch.mask[:, ::3].sum()
    np.testing.assert_allclose(batch.input[:, ::3], batch.target[:, ::3])
    with pytest.raises(ValueError, match="no part empty"):
        make("data", "lorenz_63_parameters", num_samples=3).build()
    with pytest.raises(ValueError, match="bounds that ascend"):
        make("data", "lorenz_63_parameters", rho=(3.0, 2.0))
    with pytest.raises(ValueError, match="system whose state is a vector"):
        make("data", "observations", system=make("data", "advection_1d"))


def test_fields_of_downscaling_are_those_of_the_system():
    system = make("data", "burgers_1d", num_points=16, num_samples=10,
                  temporal_horizon=4)  # fmt: skip
    spec = make("data", "downscaling", system=system, factor=4, subsample=2, every=3)
    parts = [part.arrays for part in spec.build()]
    assert [p.target.shape for p in parts] == [(n, 1, 8) for n in (16, 2, 2)]
    assert spec.state_shape() == (1, 8)
    make_key, cut = jax.random.split(jax.random.key(0))
    whole = system.trajectories(make_key)
    states = tx.data.split_by_trajectory(whole, (0.8, 0.1, 0.1), key=cut).test.state
    np.testing.assert_array_equal(parts[2].target[1], states[0, 3, :, ::2])
    blocks = parts[2].target.reshape(2, 1, 2, 4).mean(axis=-1)
    np.testing.assert_allclose(parts[2].condition, blocks, rtol=1e-12)
    with pytest.raises(ValueError, match="system whose state is a field"):
        make("data", "downscaling", system=make("data", "lorenz_63"))
    with pytest.raises(ValueError, match=r"factor \* subsample = 6 points, got \[16\]"):
        make("data", "downscaling", system=system, factor=3, subsample=2)
    with pytest.raises(ValueError, match="sigma_min below sigma_max"):
        make("generator", "edm", sigma_min=2.0, sigma_max=1.0)


def test_what_a_sampler_does_between_its_ends():
    built = make(
        "generator", "edm", churn=2.0, churn_range=(0.1, 5.0), churn_noise=1.01
    )
    expected = tx.generation.EDMSampler(
        churn=2.0, churn_range=(0.1, 5.0), churn_noise=1.01
    )
    assert built.build() == expected
    assert make("generator", "edm").build() == tx.generation.EDMSampler()
    with pytest.raises(ValueError, match="churn_range that ascends, got 5.0 and 0.1"):
        make("generator", "edm", churn_range=(5.0, 0.1))


NEXT = """
precision: float64
data: {kind: advection_1d, num_points: 16, num_samples: 10, temporal_horizon: 4}
model: {kind: denoiser, hidden_channels: 2, num_levels: 1}
configuration: {kind: denoising, next_step: true}
optimizer: {kind: adam, learning_rate: 1e-3}
training: {num_steps: 3, batch_size: 8}
callbacks: [{kind: generation, every: 5, num_fields: 3}]
"""


def test_a_state_is_drawn_given_the_one_before():
    built = experiment.build(experiment.read_run(NEXT))
    states = built.split.train.state
    pairs = tx.generation.Fields(
        *(x.reshape(-1, 1, 16) for x in (states[:, 1:], states[:, :-1]))
    )
    np.testing.assert_allclose(
        jax.tree.leaves(built.model.scales),
        jax.tree.leaves(built.model.scales.fitted(pairs)),
    )
    assert built.trainer.configuration.next_step
    (callback,) = built.trainer.callbacks
    held_out = built.split.validation.state
    np.testing.assert_array_equal(callback.target, held_out[0, 1:4])
    np.testing.assert_array_equal(callback.condition, held_out[0, :3])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", next_step: true", "", "configuration denoising needs fields"),
        ("{kind: denoiser, hidden_channels: 2, num_levels: 1}", "mlp",
         "model mlp needs states"),
        ("kind: generation, every: 5, num_fields: 3", "kind: rollout, every: 5",
         "model that steps with the callback rollout, got denoiser"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_the_next_step(old, new, message):
    assert old in NEXT
    with pytest.raises(experiment.RunFileError, match=message):
        experiment.read_run(NEXT.replace(old, new))


@pytest.mark.slow
def test_a_run_whose_model_draws_leaves_an_artifact(tmp_path):
    run = experiment.read_run(NEXT, ["callbacks=[]"])
    *_, artifact = experiment.train(run, tmp_path)
    assert set(artifact["results"]) == {"last_loss", "test_loss"}
    described = {"run": run.to_data(), "fields": {"seed": [0]}, "rank_by": "rollout"}
    with pytest.raises(experiment.RunFileError, match="steps to rank by rollout"):
        experiment.read_sweep(json.dumps(described))


def test_every_field_of_the_generation_callback_is_its_own():
    system = make("data", "burgers_1d", num_points=16, num_samples=10,
                  temporal_horizon=4)  # fmt: skip
    split = make("data", "downscaling", system=system).build()
    sampler = make("generator", "flow", num_steps=3)
    spec = make("callback", "generation", every=5, sampler=sampler, num_samples=2,
                num_fields=3, use_ema=True)  # fmt: skip
    built = spec.build(None, split)
    assert (built.every, built.num_samples, built.use_ema) == (5, 2, True)
    assert built.sampler == tx.generation.FlowSampler(3)
    np.testing.assert_array_equal(built.target, split.validation.arrays.target[:3])
    np.testing.assert_array_equal(
        built.condition, split.validation.arrays.condition[:3]
    )


def test_a_field_of_a_netcdf_file(tmp_path):
    h5netcdf = pytest.importorskip("h5netcdf")
    field = np.random.default_rng(0).normal(280.0, 5.0, size=(30, 5, 4))
    path = tmp_path / "field.nc"
    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"time": 30, "y": 5, "x": 4}
        file.create_variable("t2m", ("time", "y", "x"), data=field)
    given = {"path": str(path), "variable": "t2m", "shape": (30, 5, 4)}
    spec = make("data", "netcdf", coarsen=2, guard=3, split=(0.5, 0.25, 0.25), **given)
    split, (mean, std) = spec.build(), spec.standardisation()
    assert [p.state.shape for p in split] == [(1, n, 1, 3, 2) for n in (12, 6, 6)]
    assert spec.state_shape() == (1, 3, 2)
    np.testing.assert_allclose(split.train.state.mean(), 0, atol=1e-10)
    np.testing.assert_allclose(
        mean + std * np.asarray(split.test.state)[0, :, 0], field[-6:, ::2, ::2]
    )
    for change, message in (
        ({"variable": "u10"}, "Expected a variable 'u10'"),
        ({"shape": (31, 5, 4)}, "Expected shape \\(31, 5, 4\\)"),
        ({"path": "nowhere.nc"}, "found none. Give `data.path`"),
    ):
        with pytest.raises(ValueError, match=message):
            make("data", "netcdf", **(given | change)).build()


def test_a_residuum_of_the_datas_stepper():
    spec = make("configuration", "residuum", num_rollout_steps=2, cut_prev=True)
    built = spec.build(lambda u: 2 * u, lambda num_times: CLOCK)
    loss, _ = built(lambda u: 3 * u, jnp.ones((1, 1, 1)))
    assert built.num_times == 1 and float(loss) == 10.0  # 1² + 3²
    with pytest.raises(ValueError, match="whose stepper is known for `residuum`"):
        spec.build(None, lambda num_times: CLOCK)


def test_parts_of_a_run_fit_each_other():
    text = """
    data: {kind: lorenz_63_parameters, num_samples: 10}
    model: {kind: mlp}
    configuration: amortized_nll
    optimizer: {kind: adam, learning_rate: 1e-3}
    training: {num_steps: 10, batch_size: 8}
    """
    with pytest.raises(experiment.RunFileError, match="model mlp needs states"):
        experiment.read_run(text)
