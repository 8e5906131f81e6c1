"""What is trained on the sbibm tasks: families, candidates of heads, and how long.

Which candidate of a task is kept is decided by its held-out likelihood, by nothing else.
Candidates with linear means or a constant spread are the smallest regressions there are;
on the two Gaussian tasks the simulator is one of them, which held-out data then show.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import trainax_pk as tx
from benchmarks._sbibm_tasks import TASKS

A = tx.amortized


class LinearMeans(eqx.Module):
    """f ↦ W f + b for outputs that are means, b or a perceptron of f for the others.

    Attributes:
        linear: The map, whose weight starts at 0.
        inner: f ↦ all outputs, of which those of means are not read; None for constants.
        is_mean: Which outputs are means.
    """

    linear: eqx.nn.Linear
    inner: eqx.nn.MLP | None
    is_mean: tuple[bool, ...] = eqx.field(static=True)

    def __call__(self, f):
        """All outputs, `(n,)`."""
        is_mean = jnp.asarray(self.is_mean)
        slope = jnp.where(is_mean, self.linear.weight @ f, 0.0)
        # Without a network the biases of a mixture are what tells components apart.
        if self.inner is None:
            return slope + self.linear.bias
        return slope + jnp.where(is_mean, self.linear.bias, self.inner(f))


class Skip(eqx.Module):
    """f ↦ W f + b + g(f), g a perceptron; W and b start at 0."""

    linear: eqx.nn.Linear
    inner: eqx.nn.MLP

    def __call__(self, f):
        """All outputs, `(n,)`."""
        return self.linear(f) + self.inner(f)


class HeadEnsemble(A.AbstractHead):
    """Mean of the densities of stacked heads: (1/M) Σ_m h_m(z | f)."""

    heads: A.AbstractHead

    @property
    def dim(self):
        """d."""
        return self.heads.dim

    @property
    def num_features(self):
        """Length of f."""
        return self.heads.num_features

    @property
    def num_members(self):
        """M."""
        return jax.tree.leaves(eqx.filter(self.heads, eqx.is_array))[0].shape[0]

    def log_prob(self, z, features):
        """log (1/M) Σ_m h_m(z | f)."""
        parts = eqx.filter_vmap(lambda h: h.log_prob(z, features))(self.heads)
        return jax.nn.logsumexp(parts) - jnp.log(1.0 * self.num_members)

    def sample(self, key, features):
        """A draw of a member drawn at random."""
        which_key, key = jax.random.split(key)
        arrays, static = eqx.partition(self.heads, eqx.is_array)
        m = jax.random.randint(which_key, (), 0, self.num_members)
        head = eqx.combine(jax.tree.map(lambda x: x[m], arrays), static)
        return head.sample(key, features)


def _linear(network: eqx.nn.MLP, key: Any) -> eqx.nn.Linear:
    layer = eqx.nn.Linear(network.in_size, network.out_size, key=key)
    return jax.tree.map(jnp.zeros_like, layer)


def _replace(head: Any, network: Any) -> Any:
    return eqx.tree_at(lambda h: h.network, head, network)


def gaussian_skip(dim, num_features, *, key, **options):
    """A Gaussian of a perceptron beside a linear map."""
    head = A.FullGaussian(dim, num_features, key=key, **options)
    return _replace(head, Skip(_linear(head.network, key), head.network))


def gaussian_linear(dim, num_features, *, key, constant=False, **options):
    """A Gaussian with a linear mean, its covariance of a perceptron or constant."""
    head = A.FullGaussian(dim, num_features, key=key, **options)
    is_mean = tuple(i < dim for i in range(head.network.out_size))
    inner = None if constant else head.network
    return _replace(head, LinearMeans(_linear(head.network, key), inner, is_mean))


def mixture_skip(dim, num_features, *, key, **options):
    """A mixture of a perceptron beside a linear map."""
    head = A.GaussianMixture(dim, num_features, key=key, **options)
    return _replace(head, Skip(_linear(head.network, key), head.network))


def mixture_linear(dim, num_features, *, key, num_components):
    """A mixture of linear regressions: constant weights and covariances."""
    head = A.GaussianMixture(
        dim, num_features, num_components=num_components, depth=0, key=key
    )
    size = head.network.out_size // num_components
    is_mean = tuple(1 <= i % size <= dim for i in range(head.network.out_size))
    linear = _linear(head.network, key)
    bias = 0.5 * jax.random.normal(key, linear.bias.shape)
    linear = eqx.tree_at(lambda layer: layer.bias, linear, bias)
    return _replace(head, LinearMeans(linear, None, is_mean))


def npe(head):
    """A builder of posteriors."""

    def build(task, key, pairs):
        encoder = A.IdentityEncoder(TASKS[task].shape)
        made = head(pairs[0].shape[1], encoder.num_features, key=key)
        model = A.AmortizedPosterior(encoder, made, prior=TASKS[task].prior)
        return model.standardised(pairs)

    return build


def nle(head, *, independent=False):
    """A builder of likelihoods."""

    def build(task, key, pairs):
        shape = TASKS[task].shape[1:] if independent else TASKS[task].shape
        model = A.AmortizedLikelihood(
            head(int(np.prod(shape)), pairs[0].shape[1], key=key),
            prior=TASKS[task].prior,
            shape=shape,
            independent=independent,
        )
        return model.standardised(pairs)

    return build


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A builder `(task, key, pairs) -> model`, and the peak of its learning rate."""

    build: Callable[..., Any]
    rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """NPE or NLE, candidates by name, and members of the best one by budget."""

    family: str
    candidates: dict[str, Candidate]
    members: dict[int, int]


ONE = dict.fromkeys((1000, 10_000, 100_000), 1)
SPLINE = functools.partial(
    A.masked_autoregressive_flow, transformer="spline", num_layers=5, width=64
)
AFFINE = functools.partial(A.masked_autoregressive_flow, num_layers=5, width=64)
NETWORK = {"width": 64, "depth": 2}
RECIPES = {
    "two_moons": Recipe(
        "NPE", {"spline": Candidate(npe(SPLINE))}, {1000: 5, 10_000: 5, 100_000: 3}
    ),
    "gaussian_mixture": Recipe(
        "NLE",
        {
            "mixture": Candidate(
                nle(functools.partial(mixture_skip, num_components=4, **NETWORK)), 3e-3
            ),
            "mixture, linear": Candidate(
                nle(functools.partial(mixture_linear, num_components=4)), 1e-2
            ),
        },
        ONE,
    ),
    "slcp": Recipe(
        "NLE",
        {
            "Gaussian": Candidate(
                nle(functools.partial(gaussian_skip, **NETWORK), independent=True), 3e-3
            ),
            "Gaussian, linear mean": Candidate(
                nle(functools.partial(gaussian_linear, **NETWORK), independent=True),
                3e-3,
            ),
        },
        {1000: 5, 10_000: 5, 100_000: 1},
    ),
    "gaussian_linear_uniform": Recipe(
        "NLE",
        {
            "Gaussian": Candidate(
                nle(functools.partial(gaussian_skip, **NETWORK)), 1e-3
            ),
            "Gaussian, linear": Candidate(
                nle(functools.partial(gaussian_linear, constant=True, depth=0)), 1e-2
            ),
        },
        ONE,
    ),
    "lotka_volterra": Recipe(
        "NPE",
        {"spline": Candidate(npe(SPLINE)), "affine": Candidate(npe(AFFINE))},
        dict.fromkeys((1000, 10_000, 100_000), 5),
    ),
}
