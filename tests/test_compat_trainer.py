"""Training through the surface of trainax 0.0.2, against trainax itself."""

import itertools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trainax

import trainax_pk.compat as compat
from tests.test_compat import DATA, MODEL, REFERENCE, WEIGHTS, close, residuum

KEY = jax.random.key(5)
ADAM = optax.adam(optax.exponential_decay(3e-2, 5, 0.8))
# 40 or fewer windows in batches of 13: three batches and a remainder per epoch.
OPTIONS = {"optimizer": ADAM, "num_training_steps": 12, "batch_size": 13}


def trainers():
    """`(name, options)`."""
    cuts = {"cut_bptt": True, "cut_bptt_every": 2, "time_level_weights": WEIGHTS[:3]}
    for name, more in (
        ("SupervisedTrainer", [{}]),
        (
            "DivertedChainBranchOneTrainer",
            [{"ref_stepper": REFERENCE, "cut_div_chain": f} for f in (False, True)],
        ),
        (
            "ResiduumTrainer",
            [
                {"residuum_fn": residuum, "cut_prev": p, "cut_next": n}
                for p, n in ((False, False), (True, False), (False, True))
            ],
        ),
    ):
        for options in more:
            yield name, options
            yield name, options | cuts | {"num_rollout_steps": 3}
        yield name, more[0] | {"do_sub_stacking": False, "batch_size": 5}


def supervised(package, **options):
    return package.trainer.SupervisedTrainer(DATA, **(OPTIONS | options))


def train(trainer, **options):
    return trainer(MODEL, KEY, spawn_tqdm=False, **options)


@pytest.mark.slow
class TestTraining:
    @pytest.mark.parametrize(("name", "options"), list(trainers()))
    def test_a_dozen_updates(self, name, options):
        def run(package):
            made = getattr(package.trainer, name)(DATA, **(OPTIONS | options))
            return train(made), made.full_loss(MODEL)

        close(run(compat), run(trainax))

    @pytest.mark.parametrize("name", ["DivertedChain", "MixChainPostPhysics"])
    def test_general_trainer(self, name):
        def run(package):
            made = package.GeneralTrainer(
                package.TrajectorySubStacker(DATA, 3),
                getattr(package.configuration, name)(1),
                ref_stepper=REFERENCE,
                optimizer=ADAM,
                num_minibatches=12,
                batch_size=13,
            )
            return train(made)

        close(run(compat), run(trainax))

    @pytest.mark.parametrize("has_callback", [False, True])
    @pytest.mark.parametrize("history", [False, True])
    @pytest.mark.parametrize("every", [1, 5])
    def test_what_is_returned(self, has_callback, history, every):
        def run(package):
            callback = package.callback.WeightNorm(4) if has_callback else None
            made = supervised(package, callback_fn=callback)
            return train(made, return_loss_history=history, record_loss_every=every)

        ours, theirs = run(compat), run(trainax)
        assert type(ours) is type(theirs)
        close(ours, theirs)
        if has_callback:
            assert [list(x) for x in ours[-1]] == [list(x) for x in theirs[-1]]

    def test_no_updates(self):
        def run(package):
            return train(supervised(package, num_training_steps=0))

        close(run(compat), run(trainax))

    def test_batch_of_all_data(self):
        theirs = train(supervised(trainax, batch_size=60))
        with pytest.warns(UserWarning, match="larger than the total"):
            ours = train(supervised(compat, batch_size=60))
        close(ours, theirs)

    def test_state_of_the_optimizer(self):
        """Handed over, also with plain numbers in it, and continued."""
        rule = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
        opt_state = rule.init(eqx.filter(MODEL, eqx.is_array))
        opt_state.hyperparams["learning_rate"] = 0.5

        def run(package):
            return supervised(package, optimizer=rule)(
                MODEL, KEY, opt_state, spawn_tqdm=False
            )

        close(run(compat), run(trainax))

    def test_complex_parameters(self):
        class Waves(eqx.Module):
            factors: jax.Array

            def __call__(self, u):
                return jnp.fft.irfft(jnp.fft.rfft(u) * self.factors, n=u.shape[-1])

        model = Waves(jnp.exp(1j * jnp.arange(4.0)[None]) * 0.9)

        def run(package):
            made = supervised(package, num_rollout_steps=2)
            return made(model, KEY, spawn_tqdm=False)

        close(run(compat), run(trainax))

    def test_integer_buffers_ride_along(self):
        class Counted(eqx.Module):
            count: jax.Array
            inner: eqx.Module

            def __call__(self, u):
                return self.inner(u)

        model = Counted(jnp.array([3, 4]), MODEL)
        trained, losses = supervised(compat)(model, KEY, spawn_tqdm=False)
        np.testing.assert_array_equal(trained.count, [3, 4])
        close((trained.inner, losses), train(supervised(trainax)))

    def test_single_precision_history(self):
        model, data = jax.tree.map(lambda x: x.astype(jnp.float32), (MODEL, DATA))
        weights = jnp.ones(1, jnp.float32)

        def run(package):
            made = package.trainer.SupervisedTrainer(
                data, time_level_weights=weights, **OPTIONS
            )
            return made(model, KEY, spawn_tqdm=False)

        close(run(compat), run(trainax), 1e-5)


class TestTransformed:
    def test_vmap_over_seeds(self):
        def run(package):
            @eqx.filter_vmap
            def many(key, scale):
                model = jax.tree.map(lambda x: x * scale, MODEL)
                made = supervised(package, callback_fn=package.callback.GetNetwork(5))
                return made(model, key, spawn_tqdm=False)

            return many(jax.random.split(KEY, 2), jnp.array([1.0, 0.7]))

        close(run(compat), run(trainax))

    @pytest.mark.parametrize("what", ["rate", "data", "reference"])
    def test_vmap_over_what_the_trainer_holds(self, what):
        def run(package):
            @eqx.filter_vmap
            def many(factor):
                scale = {"rate": 1.0, "data": 1.0, "reference": 1.0, what: factor}
                reference = jax.tree.map(lambda x: x * scale["reference"], REFERENCE)
                made = package.trainer.DivertedChainBranchOneTrainer(
                    DATA * scale["data"],
                    **OPTIONS | {"optimizer": optax.adam(1e-2 * scale["rate"])},
                    ref_stepper=reference,
                )
                return train(made)

            return many(jnp.array([1.0, 0.7, 2.0]))

        close(run(compat), run(trainax))


class TestCallbacks:
    def test_all_of_them(self, tmp_path):
        def run(package):
            c, configuration = package.callback, package.configuration
            parts = [
                c.GetNetwork(3),
                c.WeightNorm(2),
                c.WeightNorm(5, squared=True, name="squared"),
                c.Loss(
                    4, configuration.Residuum(), residuum_fn=residuum, name="residuum"
                ),
                c.Loss(5, configuration.Supervised(), with_grad=True, name="both"),
                c.GradNorm(
                    3,
                    configuration.DivertedChainBranchOne(),
                    ref_stepper=REFERENCE,
                    name="norm",
                ),
                c.GradNorm(4, configuration.Supervised(), squared=True, name="norm2"),
                c.SaveNetwork(6, str(tmp_path), "model"),
            ]
            return train(supervised(package, callback_fn=c.CompositeCallback(parts)))

        ours, theirs = run(compat), run(trainax)
        close(ours, theirs)
        # trainax 0.0.2 exchanges two arguments and writes nothing.
        assert len(list(tmp_path.iterdir())) == 2
        for i in (0, 6):
            file = tmp_path / f"model_{i}.eqx"
            close(eqx.tree_deserialise_leaves(file, MODEL), theirs[2][i]["network"])
        for a, b in zip(ours[2], theirs[2], strict=True):
            assert [(k, v is None) for k, v in a.items()] == [
                (k, v is None) for k, v in b.items()
            ]

    @pytest.mark.parametrize(
        "form", ["plain", "in a composite", "own call", "callback"]
    )
    def test_those_of_users(self, form):
        def run(package):
            def plain(update_i, stepper, data):
                return {"seen": (jnp.asarray(update_i), stepper.left, data)}

            class OwnCall(package.callback.BaseCallback):
                def callback(self, update_i, stepper, data):
                    return data.sum()

                def __call__(self, update_i, stepper, data):
                    due = update_i in (1, 2, 7)
                    return {
                        self.name: self.callback(update_i, stepper, data) if due else -1
                    }

            class Mean(package.callback.BaseCallback):
                factor: float = 2.0

                def callback(self, update_i, stepper, data):
                    return self.factor * data.mean() + stepper.left.sum() + update_i

            made = {
                "plain": plain,
                "in a composite": package.callback.CompositeCallback(
                    [plain, package.callback.WeightNorm(3)]
                ),
                "own call": OwnCall(4, "own"),
                "callback": Mean(4, "mean"),
            }[form]
            return train(supervised(package, callback_fn=made))

        ours, theirs = run(compat), run(trainax)
        close(ours, theirs)
        assert jax.tree.structure(ours[2]) == jax.tree.structure(theirs[2])

    def test_interval_is_checked(self):
        with pytest.raises(ValueError, match="`every`"):
            compat.callback.GetNetwork(0)


class TestSubclasses:
    def test_own_configuration_loss_and_step(self):
        def run(package):
            class Quartic(package.loss.BaseLoss):
                def single_batch(self, prediction, target=None):
                    return jnp.mean((prediction - target) ** 4)

            class Middle(package.configuration.BaseConfiguration):
                loss: package.loss.BaseLoss
                shift: jax.Array

                def __call__(
                    self, stepper, data, *, ref_stepper=None, residuum_fn=None
                ):
                    u = jax.vmap(stepper)(data[:, 0]) + self.shift
                    return self.loss(u, jax.vmap(ref_stepper)(data[:, 0]))

            class Clipped(package.GeneralTrainer):
                bound: float = 0.01

                def step_fn(self, stepper, opt_state, data):
                    loss, grad = eqx.filter_value_and_grad(self.loss_configuration)(
                        stepper, data, ref_stepper=self.ref_stepper
                    )
                    grad = jax.tree.map(
                        lambda g: jnp.clip(g, -self.bound, self.bound), grad
                    )
                    updates, opt_state = self.optimizer.update(grad, opt_state, stepper)
                    return eqx.apply_updates(stepper, updates), opt_state, 2 * loss

            made = Clipped(
                package.TrajectorySubStacker(DATA, 2),
                Middle(Quartic(batch_reduction=jnp.sum), jnp.array(0.3)),
                ref_stepper=REFERENCE,
                optimizer=optax.sgd(0.1, momentum=0.9),
                num_minibatches=9,
                batch_size=13,
            )
            return train(made)

        close(run(compat), run(trainax))

    @pytest.mark.parametrize("every", [1, 4])
    def test_own_windows(self, every):
        """Called from Python with the very indices, so that it may do as it likes."""

        def run(package):
            count = itertools.count()

            class Noisy(package.TrajectorySubStacker):
                def __call__(self, indices):
                    noise = np.random.default_rng(next(count)).normal(size=len(indices))
                    return super().__call__(indices) + noise[:, None, None, None]

            made = package.GeneralTrainer(
                Noisy(DATA, 3),
                package.configuration.Supervised(2),
                optimizer=ADAM,
                num_minibatches=9,
                batch_size=13,
                callback_fn=package.callback.WeightNorm(3),
            )
            return train(made, record_loss_every=every)

        close(run(compat), run(trainax))


def quickstart(package, rollout, num_training_steps):
    data = package.sample_data.advection_1d_periodic(
        cfl=-0.75, key=jax.random.PRNGKey(0)
    )
    model = eqx.nn.Conv1d(
        1,
        1,
        2,
        padding="SAME",
        padding_mode="CIRCULAR",
        use_bias=False,
        key=jax.random.PRNGKey(73),
    )
    trainer = package.trainer.SupervisedTrainer(
        data,
        num_rollout_steps=rollout,
        optimizer=optax.adam(1e-2),
        num_training_steps=num_training_steps,
        batch_size=32,
    )
    trained, losses = trainer(model, key=jax.random.PRNGKey(42))
    stencil = jnp.array([0.25, 0.75])
    return float(jnp.linalg.norm(trained.weight[0, 0] - stencil)), np.asarray(losses)


@pytest.mark.parametrize(
    "rollout", [1, *[pytest.param(n, marks=pytest.mark.slow) for n in (5, 20)]]
)
def test_quickstart(rollout):
    with jax.enable_x64(False):
        ours, theirs = (quickstart(p, rollout, 1000) for p in (compat, trainax))
    assert f"{ours[0]:.4f}" == f"{theirs[0]:.4f}"
    np.testing.assert_allclose(ours[1][:100], theirs[1][:100], rtol=1e-5)


def test_one_import_is_the_only_change(monkeypatch):
    monkeypatch.setitem(sys.modules, "trainax", compat)
    import trainax as substituted  # noqa: PLC0415

    assert substituted is compat
