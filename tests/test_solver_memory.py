"""Temporaries and program size of learned solvers, compiled and not run."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx

pytestmark = pytest.mark.slow

S = tx.solver

# Tests compile much and compute little.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _memory_problem(rank):
    keys = jax.random.split(jax.random.key(0))
    if rank == 1:
        prior = lambda x: 0.5 * jnp.tanh(x)  # noqa: E731
        modulator = S.ConvLSTMGradMod1D(3, 8, key=keys[1])
        return (8, 50, 3), prior, modulator
    prior = S.BilinAEPrior2D(10, 4, key=keys[0])
    modulator = S.ConvLSTMGradMod2D(10, 4, key=keys[1])
    return (8, 10, 128, 128), prior, modulator


def _program(rank, adjoint, num_steps):
    shape, prior, modulator = _memory_problem(rank)
    kinds = {1: (tx.Batch1D, S.FourDVarNet1D), 2: (tx.Batch2D, S.FourDVarNet2D)}
    kind, net = kinds[rank]
    model = net(prior, modulator, num_steps, solver_adjoint=adjoint)
    dynamic, static = eqx.partition(model, eqx.is_array)
    dynamic = jax.tree.map(lambda x: x.astype(jnp.float32), dynamic)

    def value(dynamic, y):
        model = eqx.combine(dynamic, static)
        return S.train_loss_fn(model, kind(y, jnp.ones(y.shape, bool), y))

    y = jax.ShapeDtypeStruct(shape, jnp.float32)
    return _jit(jax.grad(value)).lower(dynamic, y)


@functools.cache
def _temporaries(rank, adjoint, num_steps):
    compiled = _program(rank, adjoint, num_steps).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rank", [1, 2])
def test_backward_temporaries(rank):
    """K = 8 → 64 steps; 2D at (8, 10, 128, 128), compiled and not run."""
    direct = [_temporaries(rank, tx.DirectAdjoint(), n) for n in (8, 64)]
    assert direct[1] > 5 * direct[0]
    if rank == 1:
        half = _temporaries(rank, tx.DirectAdjoint(), 36)
        np.testing.assert_allclose(direct[1] - half, half - direct[0], rtol=0.02)
    # 2√K states at once: their number grows by √8.
    few = [
        _temporaries(rank, tx.RecursiveCheckpointAdjoint(c), n)
        for n, c in ((8, 6), (64, 16))
    ]
    assert few[1] / few[0] < np.sqrt(8) and few[1] < direct[1] / 8
    k_step = [_temporaries(rank, tx.KStepAdjoint(2), n) for n in (8, 64)]
    assert k_step[1] <= 1.05 * k_step[0] and k_step[0] < direct[0] / 2


def test_program_does_not_grow_with_the_number_of_steps():
    for adjoint in (tx.DirectAdjoint(), tx.KStepAdjoint(2)):
        few, many = (len(_program(1, adjoint, n).as_text()) for n in (8, 64))
        assert many <= 1.01 * few
