"""Loss and gradient of every configuration and option equal those of trainax 0.0.2."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainax

import trainax_pk as tx

OURS, THEIRS = tx.configuration, trainax.configuration
CUTS = [(False, 1), (True, 1), (True, 2), (True, 3)]
STEPS = 4


class Stencil(eqx.Module):
    """A nonlinear stencil without symmetry, cheap to compile."""

    weight: jax.Array

    def __call__(self, u):
        a, b, c = self.weight
        return a * u + b * jnp.roll(u, 1, axis=-1) + c * u**2


def _residuum(u_next, u_prev):
    return u_next**2 - 1.3 * jnp.roll(u_prev, 1, axis=-1) + 0.2


def _data(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.2, 0.6, shape))


DATA = _data((5, 8, 2, 6))
MODEL = Stencil(jnp.array([0.7, -0.4, 0.3]))
REFERENCE = Stencil(jnp.array([0.9, 0.2, -0.15]))
WEIGHTS = jnp.array([0.3, 1.7, 0.0, 0.8, 1.1, 0.45, 2.0])
BRANCH = jnp.array([0.6, 1.4, 0.2, 1.9])
CALL = {"ref_stepper": REFERENCE, "residuum_fn": _residuum}

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _assert_equal(theirs, ours, model=MODEL, data=DATA, reference=CALL):
    params, static = eqx.partition(model, eqx.is_array)

    def value_and_grad(loss):
        return jax.value_and_grad(lambda p: loss(eqx.combine(p, static)))

    # trainax unrolls: without jit nothing of it has to be compiled.
    loss_t, grad_t = value_and_grad(lambda m: theirs(m, data, **reference))(params)
    loss_o, grad_o = _jit(value_and_grad(lambda m: ours(m, data)[0]))(params)
    assert loss_t > 1e-6
    np.testing.assert_allclose(loss_o, loss_t, rtol=1e-10)
    for a, b in zip(jax.tree.leaves(grad_o), jax.tree.leaves(grad_t), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * jnp.max(jnp.abs(b)))


def _chain_options(cut_bptt, every, count):
    return {
        "cut_bptt": cut_bptt,
        "cut_bptt_every": every,
        "time_level_weights": WEIGHTS[:count],
    }


cuts = pytest.mark.parametrize(("cut_bptt", "every"), CUTS)


@pytest.mark.parametrize(
    ("cut_bptt", "every"), [*CUTS, (False, 2), (True, STEPS), (True, STEPS + 1)]
)
def test_supervised(cut_bptt, every):
    options = _chain_options(cut_bptt, every, STEPS)
    _assert_equal(
        THEIRS.Supervised(STEPS, **options), OURS.Supervised(STEPS, **options)
    )


@pytest.mark.parametrize("branch", [1, 2, 3, STEPS])
@pytest.mark.parametrize("cut_div_chain", [False, True])
@cuts
def test_diverted_chain(cut_bptt, every, cut_div_chain, branch):
    options = _chain_options(cut_bptt, every, STEPS) | {
        "cut_div_chain": cut_div_chain,
        "branch_level_weights": BRANCH[:branch],
    }
    _assert_equal(
        THEIRS.DivertedChain(STEPS, branch, **options),
        OURS.DivertedChain(STEPS, branch, ref_stepper=REFERENCE, **options),
    )


@pytest.mark.parametrize("cut_div_chain", [False, True])
@cuts
def test_diverted_chain_branch_one(cut_bptt, every, cut_div_chain):
    options = _chain_options(cut_bptt, every, STEPS)
    options["cut_div_chain"] = cut_div_chain
    _assert_equal(
        THEIRS.DivertedChainBranchOne(STEPS, **options),
        OURS.DivertedChainBranchOne(STEPS, ref_stepper=REFERENCE, **options),
    )


@pytest.mark.parametrize("counts", [(1, 1), (1, 3), (3, 2), (4, 3)])
@cuts
def test_mix_chain_post_physics(cut_bptt, every, counts):
    options = _chain_options(cut_bptt, every, sum(counts))
    _assert_equal(
        THEIRS.MixChainPostPhysics(*counts, **options),
        OURS.MixChainPostPhysics(*counts, ref_stepper=REFERENCE, **options),
    )


@pytest.mark.parametrize("cut_prev", [False, True])
@pytest.mark.parametrize("cut_next", [False, True])
@cuts
def test_residuum(cut_bptt, every, cut_prev, cut_next):
    if cut_prev and cut_next and cut_bptt and every == 1:
        pytest.skip("Nothing is left to differentiate.")
    options = _chain_options(cut_bptt, every, STEPS)
    options |= {"cut_prev": cut_prev, "cut_next": cut_next}
    _assert_equal(
        THEIRS.Residuum(STEPS, **options),
        OURS.Residuum(STEPS, residuum_fn=_residuum, **options),
    )


def test_residuum_without_gradient():
    options = {"cut_bptt": True, "cut_prev": True, "cut_next": True}
    ours = OURS.Residuum(STEPS, residuum_fn=_residuum, **options)
    theirs = THEIRS.Residuum(STEPS, **options)
    loss, grad = eqx.filter_value_and_grad(lambda m: ours(m, DATA)[0])(MODEL)
    np.testing.assert_allclose(loss, theirs(MODEL, DATA, **CALL), rtol=1e-12)
    np.testing.assert_array_equal(grad.weight, 0.0)


LOSSES = {
    "mae": (trainax.loss.MAELoss(), tx.loss.mae),
    "nmse": (trainax.loss.Normalized_MSELoss(), tx.loss.nmse),
    "nmae": (trainax.loss.Normalized_MAELoss(), tx.loss.nmae),
    "sum": (
        trainax.loss.MSELoss(batch_reduction=jnp.sum),
        tx.loss.BatchLoss(lambda p, t: jnp.sum(jax.vmap(tx.loss.mse)(p, t))),
    ),
    "maximum": (
        trainax.loss.MAELoss(batch_reduction=jnp.max),
        tx.loss.BatchLoss(lambda p, t: jnp.max(jax.vmap(tx.loss.mae)(p, t))),
    ),
}


@pytest.mark.parametrize("kind", ["supervised", "diverted", "mix", "residuum"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, kind):
    if kind == "residuum" and name in ("nmse", "nmae"):
        pytest.skip("A residuum has no target to be normalised by.")
    options = {"time_level_weights": WEIGHTS[:STEPS]}
    ref = {"ref_stepper": REFERENCE}
    theirs, ours = {
        "supervised": (THEIRS.Supervised, OURS.Supervised),
        "diverted": (
            functools.partial(THEIRS.DivertedChain, num_branch_steps=2),
            functools.partial(OURS.DivertedChain, num_branch_steps=2, **ref),
        ),
        "mix": (
            functools.partial(THEIRS.MixChainPostPhysics, num_post_physics_steps=2),
            functools.partial(
                OURS.MixChainPostPhysics, num_post_physics_steps=2, **ref
            ),
        ),
        "residuum": (
            THEIRS.Residuum,
            functools.partial(OURS.Residuum, residuum_fn=_residuum),
        ),
    }[kind]
    steps = STEPS - 2 if kind == "mix" else STEPS
    loss_t, loss_o = LOSSES[name]
    _assert_equal(
        theirs(steps, time_level_loss=loss_t, **options),
        ours(steps, time_level_loss=loss_o, **options),
    )


@pytest.mark.parametrize("weights", [[1.0, 0.35, 2.0], [0.2, -0.5, 1.1]])
def test_composite(weights):
    options = {"time_level_weights": WEIGHTS[:STEPS]}
    cut = {"cut_bptt": True, "cut_bptt_every": 2}
    _assert_equal(
        THEIRS.Composite(
            [
                THEIRS.Supervised(STEPS, **options),
                THEIRS.Residuum(3, **cut),
                THEIRS.DivertedChain(STEPS, 2, cut_div_chain=True, **options),
            ],
            weights,
        ),
        OURS.Composite(
            [
                OURS.Supervised(STEPS, **options),
                OURS.Residuum(3, residuum_fn=_residuum, **cut),
                OURS.DivertedChain(
                    STEPS, 2, ref_stepper=REFERENCE, cut_div_chain=True, **options
                ),
            ],
            weights,
        ),
    )


def test_defaults_agree():
    for steps in (1, 3):
        _assert_equal(THEIRS.Supervised(steps), OURS.Supervised(steps))
        _assert_equal(
            THEIRS.DivertedChain(steps),
            OURS.DivertedChain(steps, ref_stepper=REFERENCE),
        )
        _assert_equal(
            THEIRS.Residuum(steps), OURS.Residuum(steps, residuum_fn=_residuum)
        )
    _assert_equal(
        THEIRS.MixChainPostPhysics(), OURS.MixChainPostPhysics(ref_stepper=REFERENCE)
    )


def _conv(spatial, seed):
    kind = {1: eqx.nn.Conv1d, 2: eqx.nn.Conv2d}[spatial]
    return kind(
        2,
        2,
        3,
        padding="SAME",
        padding_mode="CIRCULAR",
        key=jax.random.key(seed),
    )


@pytest.mark.parametrize("spatial", [1, 2])
def test_convolutions(spatial):
    data = _data((3, 4, 2, *(5, 4)[:spatial]), seed=3)
    model, ref = _conv(spatial, 0), _conv(spatial, 1)
    options = {"time_level_weights": WEIGHTS[:3], "cut_bptt": True, "cut_bptt_every": 2}
    _assert_equal(
        THEIRS.Supervised(3, **options), OURS.Supervised(3, **options), model, data
    )
    _assert_equal(
        THEIRS.DivertedChain(3, 2, **options),
        OURS.DivertedChain(3, 2, ref_stepper=ref, **options),
        model,
        data,
        {"ref_stepper": ref},
    )
    _assert_equal(
        THEIRS.MixChainPostPhysics(2, 1, **options),
        OURS.MixChainPostPhysics(2, 1, ref_stepper=ref, **options),
        model,
        data,
        {"ref_stepper": ref},
    )


@pytest.mark.parametrize("adjoint", [None, 3])
def test_adjoints_change_no_number(adjoint):
    adjoint = tx.RecursiveCheckpointAdjoint(adjoint)
    options = _chain_options(True, 2, 3)
    more = {"ref_stepper": REFERENCE, "adjoint": adjoint}
    _assert_equal(
        THEIRS.Supervised(3, **options),
        OURS.Supervised(3, adjoint=adjoint, **options),
    )
    _assert_equal(
        THEIRS.DivertedChain(3, 2, **options),
        OURS.DivertedChain(3, 2, **options, **more),
    )
    options["time_level_weights"] = WEIGHTS[:5]
    _assert_equal(
        THEIRS.MixChainPostPhysics(3, 2, **options),
        OURS.MixChainPostPhysics(3, 2, **options, **more),
    )
