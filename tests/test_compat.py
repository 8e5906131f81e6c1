"""The surface of trainax 0.0.2, against trainax itself."""

import dataclasses
import functools
import importlib
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainax

import trainax_pk.compat as compat

PACKAGES = (trainax, compat)
DATA = jax.random.normal(jax.random.key(3), (5, 9, 2, 7))
MODULES = ("callback", "configuration", "loss", "trainer", "sample_data")


class Stepper(eqx.Module):
    """Two channels, asymmetric in space and not linear."""

    left: jax.Array
    right: jax.Array

    def __init__(self, seed):
        keys = jax.random.split(jax.random.key(seed))
        self.left, self.right = (jax.random.normal(k, (2, 2)) for k in keys)

    def __call__(self, u):
        shifted = jnp.roll(u, 1, axis=-1)
        return 0.9 * u + 0.3 * jnp.tanh(self.left @ u + self.right @ shifted)


MODEL, REFERENCE = Stepper(0), Stepper(1)


def residuum(u_next, u_prev):
    """Sees batches, as trainax hands them over, and mixes them."""
    return u_next**2 - jnp.roll(u_prev, 1, axis=-1) + 0.1 * jnp.roll(u_next, 1, axis=0)


def close(ours, theirs, tolerance=1e-10):
    ours, theirs = (
        jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (ours, theirs)
    )
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-14)


def names():
    for name in trainax.__all__:
        if inspect.ismodule(getattr(trainax, name)):
            module = getattr(trainax, name)
            inside = getattr(module, "__all__", ()) or (
                n
                for n, x in vars(module).items()
                if not n.startswith("_")
                and getattr(x, "__module__", "").endswith("data")
            )
            yield from (f"{name}.{n}" for n in inside)
        else:
            yield name


def parameters(function):
    signature = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, repr(p.default)) for p in signature]


def lookup(package, name):
    return functools.reduce(getattr, name.split("."), package)


class TestSurface:
    def test_all_modules_are_there(self):
        assert set(trainax.__all__) == set(compat.__all__)
        assert {n.split(".")[0] for n in names() if "." in n} == set(MODULES)
        for name in MODULES:
            assert importlib.import_module(f"trainax_pk.compat.{name}")

    @pytest.mark.parametrize("name", list(names()))
    def test_signature(self, name):
        theirs, ours = (lookup(p, name) for p in PACKAGES)
        assert parameters(ours) == parameters(theirs)
        if not inspect.isclass(theirs):
            return
        public = [n for n in dir(theirs) if not n.startswith("_") or n == "__call__"]
        for n in public:
            member = getattr(theirs, n)
            if inspect.isfunction(member):
                assert parameters(getattr(ours, n)) == parameters(member), n
        bases = [
            [c.__name__ for c in cls.__mro__ if c.__module__.startswith("trainax")]
            for cls in (ours, theirs)
        ]
        assert bases[0] == bases[1]

    @pytest.mark.parametrize("name", [n for n in names() if "Trainer" in n])
    def test_attributes_of_trainers(self, name):
        theirs, ours = (lookup(p, name) for p in PACKAGES)
        assert [f.name for f in dataclasses.fields(ours)] == [
            f.name for f in dataclasses.fields(theirs)
        ]

    def test_attributes_of_the_rest(self):
        for name in ("Supervised", "DivertedChain", "Residuum", "MixChainPostPhysics"):
            theirs, ours = (getattr(p.configuration, name)(1) for p in PACKAGES)
            for field in dataclasses.fields(theirs):
                if field.name != "time_level_loss":
                    got, want = (getattr(x, field.name) for x in (ours, theirs))
                    np.testing.assert_array_equal(got, want)
        for name in ("MSELoss", "MAELoss", "Normalized_MSELoss", "Normalized_MAELoss"):
            assert getattr(compat.loss, name)().batch_reduction is jnp.mean


class TestWindowsAndOrder:
    @pytest.mark.parametrize("do_sub_stacking", [True, False])
    @pytest.mark.parametrize("only_store_ic", [True, False])
    @pytest.mark.parametrize(
        "indices",
        [jnp.array([3, 0, 3]), slice(1, 9, 2), slice(None), jnp.array([-1]), 2],
        ids=str,
    )
    def test_windows(self, do_sub_stacking, only_store_ic, indices):
        options = {"do_sub_stacking": do_sub_stacking, "only_store_ic": only_store_ic}
        theirs, ours = (p.TrajectorySubStacker(DATA, 4, **options) for p in PACKAGES)
        assert ours.num_total_samples == theirs.num_total_samples
        np.testing.assert_array_equal(ours(indices), theirs(indices))
        np.testing.assert_array_equal(
            ours.data_sub_trajectories, theirs.data_sub_trajectories
        )

    def test_windows_by_a_list(self):
        stacker = compat.TrajectorySubStacker(DATA, 4)
        np.testing.assert_array_equal(stacker([4, 0]), stacker(jnp.array([4, 0])))

    @pytest.mark.parametrize("make_key", [jax.random.PRNGKey, jax.random.key])
    @pytest.mark.parametrize("sizes", [(23, 17, 5), (20, 9, 5), (7, 4, 7), (6, 3, 1)])
    def test_order(self, make_key, sizes):
        key = make_key(11)
        theirs, ours = (p.PermutationMixer(*sizes, key) for p in PACKAGES)
        for name in ("num_minibatches_per_epoch", "num_epochs", "batch_size"):
            assert getattr(ours, name) == getattr(theirs, name)
        np.testing.assert_array_equal(ours.permutations, theirs.permutations)
        for i in range(sizes[1]):
            (a, at), (b, bt) = (m(i, return_info=True) for m in (ours, theirs))
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(ours(i), b)
            assert at == bt

    def test_batch_larger_than_data_warns(self):
        with pytest.warns(UserWarning, match="larger than the total number"):
            mixer = compat.PermutationMixer(5, 3, 8, jax.random.key(0))
        assert mixer.batch_size == 5

    def test_past_the_end(self):
        mixer = compat.PermutationMixer(5, 3, 2, jax.random.key(0))
        with pytest.raises(ValueError, match="batch index below 3, got 3"):
            mixer(3)

    @pytest.mark.parametrize(
        ("data", "length", "match"),
        [
            (DATA, 10, "at most the trajectories' 9 times, got 10"),
            (DATA, 0, "`sub_trajectory_len`"),
            ((DATA, DATA[:4]), 2, "same two leading axes"),
            (jnp.zeros(3), 1, "same two leading axes"),
        ],
    )
    def test_bad_trajectories(self, data, length, match):
        with pytest.raises(ValueError, match=match):
            compat.TrajectorySubStacker(data, length)


class TestLoss:
    @pytest.mark.parametrize(
        "name", ["MSELoss", "MAELoss", "Normalized_MSELoss", "Normalized_MAELoss"]
    )
    @pytest.mark.parametrize("reduction", [jnp.mean, jnp.sum, jnp.max])
    def test_values(self, name, reduction):
        p, t = DATA[:, 0], DATA[:, 1]
        theirs, ours = (
            getattr(x.loss, name)(batch_reduction=reduction) for x in PACKAGES
        )
        close(ours(p, t), theirs(p, t))
        close(ours.multi_batch(p, t), theirs.multi_batch(p, t))
        close(ours.single_batch(p[0], t[0]), theirs.single_batch(p[0], t[0]))
        if not name.startswith("Normalized"):
            close(ours(p), theirs(p))
            close(ours.single_batch(p[0]), theirs.single_batch(p[0]))

    @pytest.mark.parametrize("name", ["Normalized_MSELoss", "Normalized_MAELoss"])
    def test_normalised_loss_without_target(self, name):
        with pytest.raises(ValueError, match="target"):
            getattr(compat.loss, name)()(DATA[:, 0])


CUTS = [(False, 1), (True, 1), (True, 2)]
WEIGHTS = jnp.linspace(0.3, 1.7, 4)


def configurations():
    """`(name, positional arguments, options)`."""
    for cut_bptt, every in CUTS:
        o = {"cut_bptt": cut_bptt, "cut_bptt_every": every}
        o["time_level_weights"] = WEIGHTS
        yield "Supervised", (4,), o
        yield "MixChainPostPhysics", (3, 1), o
        for flag in (False, True):
            yield "DivertedChainBranchOne", (4,), o | {"cut_div_chain": flag}
            branch = {"branch_level_weights": jnp.array([0.5, 2.0, 0.7])}
            yield "DivertedChain", (4, 3), o | branch | {"cut_div_chain": flag}
            yield "Residuum", (4,), o | {"cut_prev": flag, "cut_next": not flag}
    yield "Supervised", (), {}
    yield "MixChainPostPhysics", (), {}
    yield "DivertedChainBranchOne", (3,), {}
    yield "DivertedChain", (3, 2), {}
    yield "Residuum", (2,), {"cut_prev": True, "cut_next": False}


OPERANDS = {"ref_stepper": REFERENCE, "residuum_fn": residuum}


class TestConfiguration:
    @pytest.mark.parametrize(("name", "args", "options"), list(configurations()))
    def test_loss_and_gradient(self, name, args, options):
        def evaluate(package):
            made = getattr(package.configuration, name)(
                *args, **options, time_level_loss=package.loss.MAELoss()
            )
            grad = eqx.filter_value_and_grad(made)
            # Unrolled programs compile slowly and run quickly as they are.
            grad = grad if package is trainax else eqx.filter_jit(grad)
            return grad(MODEL, DATA, **OPERANDS)

        close(evaluate(compat), evaluate(trainax))

    @pytest.mark.parametrize("reduction", [jnp.sum, jnp.max])
    @pytest.mark.parametrize("name", ["Supervised", "Residuum"])
    def test_batch_reduction(self, name, reduction):
        def evaluate(package):
            loss = package.loss.MSELoss(batch_reduction=reduction)
            made = getattr(package.configuration, name)(2, time_level_loss=loss)
            return made(MODEL, DATA, **OPERANDS)

        close(evaluate(compat), evaluate(trainax))

    def test_composite(self):
        def evaluate(package):
            c = package.configuration
            parts = [c.Supervised(2), c.Residuum(3), c.DivertedChain(3, 2)]
            made = c.Composite(parts, [0.2, 1.5, 0.7])
            return made(MODEL, DATA, **OPERANDS)

        close(evaluate(compat), evaluate(trainax))

    def test_plain_functions_as_losses(self):
        def evaluate(package):
            c = package.configuration
            one = c.Residuum(2, time_level_loss=lambda r: jnp.mean(r**4))
            two = c.Supervised(2, time_level_loss=lambda p, t: jnp.max(jnp.abs(p - t)))
            return [x(MODEL, DATA, **OPERANDS) for x in (one, two)]

        close(evaluate(compat), evaluate(trainax))

    @pytest.mark.parametrize(
        "name", ["Supervised", "Residuum", "DivertedChain", "MixChainPostPhysics"]
    )
    def test_model_of_higher_precision_than_the_data(self, name):
        data = DATA.astype(jnp.float32)

        def evaluate(package):
            made = getattr(package.configuration, name)(2)
            return made(MODEL, data, **OPERANDS)

        # Unrolled, parts of the first step are done in single precision.
        close(evaluate(compat), evaluate(trainax), 1e-6)

    def test_trees_of_states(self):
        """Documented there, but failing; a sum of two independent problems here."""

        class Both(compat.loss.BaseLoss):
            def single_batch(self, prediction, target=None):
                squares = jax.tree.map(
                    lambda p, t: jnp.mean((p - t) ** 2), prediction, target
                )
                return sum(jax.tree.leaves(squares))

        made = compat.configuration.Supervised(3, time_level_loss=Both())

        def pair(u):
            return {"a": MODEL(u["a"]), "b": REFERENCE(u["b"])}

        data = {"a": DATA, "b": DATA[:, ::-1]}
        single = trainax.configuration.Supervised(3)
        want = single(MODEL, data["a"]) + single(REFERENCE, data["b"])
        close(made(pair, data), want)

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda c: c.DivertedChain(2, 3), "less than or equal to"),
            (lambda c: c.Supervised(3, time_level_weights=jnp.ones(1)), "weights"),
            (lambda c: c.Residuum(3, time_level_weights=jnp.ones(4)), "weights"),
            (lambda c: c.Supervised(9)(MODEL, DATA), "windows of 10"),
            (
                lambda c: c.MixChainPostPhysics(8, 1)(MODEL, DATA, ref_stepper=MODEL),
                "windows of 10",
            ),
            (
                lambda c: c.Composite([c.Supervised()], [1.0, 2.0])(MODEL, DATA),
                "as many weights",
            ),
            (
                lambda c: c.Supervised(2, cut_bptt=True, cut_bptt_every=0)(MODEL, DATA),
                "cut_bptt_every",
            ),
        ],
    )
    def test_refusals(self, make, match):
        with pytest.raises(ValueError, match=match):
            make(compat.configuration)
