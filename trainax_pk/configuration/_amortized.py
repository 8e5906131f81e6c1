"""Training of conditional densities on simulated pairs."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import as_number, check_count
from trainax_pk.amortized._pairs import as_pairs
from trainax_pk.amortized._training import amortized_nll_loss_fn, check_method
from trainax_pk.configuration._base import AbstractConfiguration, Aux
from trainax_pk.configuration._chain import check_callable
from trainax_pk.generation._models import is_number
from trainax_pk.loss import crps_ensemble


class AmortizedNLL(AbstractConfiguration):
    """−(1/B) Σ_b log q of simulated pairs: a posterior's (NPE) or a likelihood's (NLE).

    With pairs (θ, x) ~ p(θ) p(x | θ) its minimum over all densities is p(θ | x) for a
    model of θ given x, and p(x | θ) for one of x given θ. The value is in nats, of θ or x
    in their own units. One pass of the model, forward and backward.

    Raises:
        ValueError: When called: no pairs, shapes that the model does not take.

    Source: Papamakarios & Murray 2016, arXiv:1605.06376; Papamakarios et al. 2019,
    arXiv:1805.07226.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((3,)),
        ...     tx.amortized.DiagonalGaussian(2, 3, key=jax.random.key(0)),
        ... )
        >>> pairs = tx.amortized.Pairs(jnp.zeros((8, 2)), jnp.ones((8, 3)))
        >>> tx.configuration.AmortizedNLL()(posterior, pairs)[0].shape
        ()
    """

    @property
    def num_times(self) -> int:
        """1: a pair has no times."""
        return 1

    def __call__(
        self, model: Any, batch: Any, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch of pairs."""
        del key
        return amortized_nll_loss_fn(model, batch), Aux()


class RatioEstimation(AbstractConfiguration):
    """Contrastive training of a likelihood ratio h(θ, x) → log p(x | θ) / p(x).

    The classifier is shown K parameters and asks from which of them, or from none, x was
    simulated:

    L = −1/(1+γ) E log K/(K + γ Σ_k e^{h(θ_k, x)}) [all θ_k drawn apart from x]
        −γ/(1+γ) E log γ e^{h(θ_1, x)}/(K + γ Σ_k e^{h(θ_k, x)}) [x simulated from θ_1].

    γ chooses the normalisation: with a finite γ the minimum is the ratio itself; γ = inf
    leaves the first line out, and h is known up to a function of x, which does not change
    a posterior that is sampled but forbids comparing values between observations. K = γ =
    1 is binary classification. Other parameters come from the batch, the next ones in its
    order, which is random; cost: B (K + 1) passes of the pair network.

    Attributes:
        num_contrastive: K, below the batch size.
        gamma: γ > 0, or inf.

    Raises:
        ValueError: When built: K below 1 (2 for γ = inf), γ <= 0. When called: a batch of
            K samples or fewer.

    Source: Miller et al. 2022, arXiv:2210.06170; γ = inf is Durkan et al. 2020,
    arXiv:2002.03712; K = γ = 1 is Hermans et al. 2020, arXiv:1903.04057.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> ratio = tx.amortized.AmortizedRatio(
        ...     tx.amortized.IdentityEncoder((3,)),
        ...     prior=tx.data.Normal(jnp.zeros(2), 1.0), key=jax.random.key(0),
        ... )
        >>> pairs = tx.amortized.Pairs(jnp.zeros((8, 2)), jnp.ones((8, 3)))
        >>> configuration = tx.configuration.RatioEstimation(5)
        >>> configuration(ratio, pairs)[0].shape
        ()
    """

    num_contrastive: int = eqx.field(static=True)
    gamma: float = eqx.field(static=True)

    def __init__(self, num_contrastive: int = 5, gamma: float = 1.0) -> None:
        is_number = isinstance(gamma, int | float) and not isinstance(gamma, bool)
        if not is_number or not gamma > 0:
            raise ValueError(
                f"Expected `gamma` to be a number > 0 or math.inf, got {gamma!r}. 1 "
                "weighs both terms alike."
            )
        least = 2 if math.isinf(gamma) else 1
        self.num_contrastive = check_count(
            "num_contrastive", num_contrastive, minimum=least
        )
        self.gamma = float(gamma)

    @property
    def num_times(self) -> int:
        """1: a pair has no times."""
        return 1

    def __call__(
        self, model: Any, batch: Any, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch of pairs."""
        del key
        check_method(model, "pair")
        theta, x, mask = as_pairs(batch)
        size, count = x.shape[0], self.num_contrastive
        if size <= count:
            raise ValueError(
                f"Expected batches of more than num_contrastive={count} pairs, got "
                f"{size}. Other parameters come from the batch: pass a larger batch_size."
            )
        axes = (0, 0, None if mask is None else 0)
        z, log_det, features = jax.vmap(model.embed, in_axes=axes)(theta, x, mask)

        def paired(shift: Array) -> Float[Array, " B"]:
            rows = (jnp.arange(size) + shift) % size
            return jax.vmap(model.pair)(z[rows], log_det[rows], features)

        h = jax.vmap(paired)(jnp.arange(count + 1))  # Row 0: x and its own θ.
        own = jax.nn.logsumexp(h[:count], axis=0)
        if math.isinf(self.gamma):
            return jnp.mean(own - h[0]), Aux()
        # In logarithms: log(K + γ Σ e^h) − log K = log(1 + e^{log γ/K + logsumexp h}).
        factor = math.log(self.gamma / count)
        apart = jnp.logaddexp(0.0, factor + jax.nn.logsumexp(h[1:], axis=0))
        joint = jnp.logaddexp(0.0, factor + own) - factor - h[0]
        weight = self.gamma / (1 + self.gamma)
        return jnp.mean((1 - weight) * apart + weight * joint), Aux()


class FlowMatching(AbstractConfiguration):
    """Mean of |v(t, z_t, f(x)) − (z₁ − (1 − σ) z₀)|² with z_t = (1 − (1 − σ) t) z₀ + t z₁.

    z₁ = z(θ) of a pair, z₀ standard normal, t on [0, 1]: the velocity that carries noise
    to p(θ | x) along straight lines, learned without solving its equation (FMPE). One pass
    of the network per pair.

    Attributes:
        sigma: σ, standard deviation that is left at t = 1.
        time_exponent: α >= 0 of the density of t, ∝ t^α; above 0 more weight near θ.

    Raises:
        ValueError: When built: σ outside of [0, 1), α below 0. When called: no key.

    Source: Lipman et al. 2023, arXiv:2210.02747; Dax et al. 2023, arXiv:2305.17161.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.FlowMatchingPosterior(
        ...     tx.amortized.IdentityEncoder((3,)), 2, key=jax.random.key(0)
        ... )
        >>> pairs = tx.amortized.Pairs(jnp.zeros((8, 2)), jnp.ones((8, 3)))
        >>> configuration = tx.configuration.FlowMatching()
        >>> configuration(posterior, pairs, key=jax.random.key(1))[0].shape
        ()
    """

    sigma: float = eqx.field(static=True, default=1e-4, converter=as_number)
    time_exponent: float = eqx.field(static=True, default=0.0, converter=as_number)

    def __check_init__(self) -> None:
        check_path(self.sigma, self.time_exponent)

    @property
    def num_times(self) -> int:
        """1: a pair has no times."""
        return 1

    def __call__(
        self, model: Any, batch: Any, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch of pairs, with noise of its own for each."""
        check_method(model, "velocity")
        key = check_random(key, "FlowMatching")
        theta, x, mask = as_pairs(batch)
        axes = (0, 0, None if mask is None else 0)
        end, features = jax.vmap(model.embed, in_axes=axes)(theta, x, mask)
        t, place, wanted = straight_paths(key, end, self.sigma, self.time_exponent)
        error = jax.vmap(model.velocity)(t, place, features) - wanted
        return jnp.mean(error**2), Aux()


class Variational(AbstractConfiguration):
    """Mean over x of KL(q(θ | x) ‖ p(θ | x)) − log p(x): the negative evidence bound.

    L = E_x E_{θ ~ q(· | x)} [log q(θ | x) − log p(θ) − log p(x | θ)], by reparametrised
    draws. For simulators whose likelihood is known, or learned: no simulated θ is read.
    Reverse KL covers one mode where forward KL (`AmortizedNLL`) covers all.

    Attributes:
        log_likelihood: `(theta, x) -> scalar` of one sample, differentiable.
        prior: With `log_prob(theta)`.
        num_samples: Draws of θ for each x.

    Raises:
        ValueError: When built: no function, no density, a count below 1. When called: no
            key.

    Source: Kingma & Welling 2014, arXiv:1312.6114.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> prior = tx.data.Normal(jnp.zeros(2), 1.0)
        >>> configuration = tx.configuration.Variational(
        ...     lambda theta, x: -0.5 * jnp.sum((x - theta) ** 2), prior, num_samples=4
        ... )
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((2,)),
        ...     tx.amortized.DiagonalGaussian(2, 2, key=jax.random.key(0)), prior=prior,
        ... )
        >>> pairs = tx.amortized.Pairs(jnp.zeros((8, 2)), jnp.ones((8, 2)))
        >>> configuration(posterior, pairs, key=jax.random.key(1))[0].shape
        ()
    """

    log_likelihood: Callable[..., Array]
    prior: Any
    num_samples: int = eqx.field(static=True)

    def __init__(
        self, log_likelihood: Callable[..., Array], prior: Any, *, num_samples: int = 8
    ) -> None:
        self.log_likelihood = check_callable("log_likelihood", log_likelihood)
        if not callable(getattr(prior, "log_prob", None)):
            raise ValueError(
                f"Expected a prior with `log_prob(theta)`, got {prior!r}. Pass a prior of "
                "tx.data."
            )
        self.prior = prior
        self.num_samples = check_count("num_samples", num_samples)

    @property
    def num_times(self) -> int:
        """1: a pair has no times."""
        return 1

    def __call__(
        self, model: Any, batch: Any, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch; of pairs, only x is read."""
        check_method(model, "sample")
        _check_draws(model, "Variational")
        key = check_random(key, "Variational")
        _, x, mask = as_pairs(batch)

        def one(key: PRNGKeyArray, x: Array, mask: Array | None) -> Array:
            draws = model.sample(key, x, self.num_samples, mask)
            bound = lambda theta: (  # noqa: E731
                model.log_prob(theta, x, mask)
                - self.prior.log_prob(theta)
                - self.log_likelihood(theta, x)
            )
            return jnp.mean(jax.vmap(bound)(draws))

        keys = jax.random.split(key, x.shape[0])
        axes = (0, 0, None if mask is None else 0)
        return jnp.mean(jax.vmap(one, in_axes=axes)(keys, x, mask)), Aux()


class EnsembleCRPS(AbstractConfiguration):
    """Mean CRPS of a model's draws against the truth: `tx.loss.crps_ensemble`.

    For models that sample and have no density, or whose density matters less than its
    margins. Each entry's margin is trained, their dependence is not.

    Attributes:
        num_members: Draws per sample, at least 2.

    Raises:
        ValueError: When built: fewer than 2 members. When called: no key.

    Source: Gneiting & Raftery 2007, doi:10.1198/016214506000001437.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.AmortizedPosterior(
        ...     tx.amortized.IdentityEncoder((3,)),
        ...     tx.amortized.DiagonalGaussian(2, 3, key=jax.random.key(0)),
        ... )
        >>> pairs = tx.amortized.Pairs(jnp.zeros((8, 2)), jnp.ones((8, 3)))
        >>> configuration = tx.configuration.EnsembleCRPS(4)
        >>> configuration(posterior, pairs, key=jax.random.key(1))[0].shape
        ()
    """

    num_members: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_count("num_members", self.num_members, minimum=2)

    @property
    def num_times(self) -> int:
        """1: a pair has no times."""
        return 1

    def __call__(
        self, model: Any, batch: Any, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch of pairs."""
        check_method(model, "sample")
        _check_draws(model, "EnsembleCRPS")
        key = check_random(key, "EnsembleCRPS")
        theta, x, mask = as_pairs(batch)

        def one(key: PRNGKeyArray, theta: Any, x: Array, mask: Array | None) -> Array:
            return crps_ensemble(model.sample(key, x, self.num_members, mask), theta)

        keys = jax.random.split(key, x.shape[0])
        axes = (0, 0, 0, None if mask is None else 0)
        return jnp.mean(jax.vmap(one, in_axes=axes)(keys, theta, x, mask)), Aux()


def _check_draws(model: Any, who: str) -> None:
    """Draws that move with all that is learned, or a ValueError."""
    head = getattr(getattr(model, "members", model), "head", None)
    if not getattr(head, "reparametrised", True):
        raise ValueError(
            f"Expected draws with gradients for {who}, got a {type(head).__name__}, whose "
            "draws tell nothing of the weights that components are picked by. Train it by "
            "AmortizedNLL, or take a flow or one Gaussian."
        )


def check_random(key: PRNGKeyArray | None, who: str) -> PRNGKeyArray:
    """A key, or a ValueError."""
    if key is None:
        raise ValueError(
            f"Expected a key for {who}, which draws noise, got None. Pass "
            "key=jax.random.key(0); a train step does."
        )
    return key


def check_path(sigma: float, time_exponent: float) -> None:
    """Numbers of straight paths, or a ValueError."""
    are_numbers = is_number(sigma) and is_number(time_exponent)
    if not are_numbers or not 0 <= sigma < 1 or not 0 <= time_exponent < math.inf:
        raise ValueError(
            f"Expected `sigma` in [0, 1) and `time_exponent` >= 0, got {sigma!r} and "
            f"{time_exponent!r}. Leave them out for the defaults."
        )


def straight_paths(
    key: PRNGKeyArray, end: Float[Array, "B ..."], sigma: float, time_exponent: float
) -> tuple[Float[Array, " B"], Float[Array, "B ..."], Float[Array, "B ..."]]:
    """Times, places at these times between noise and an end, and velocities there.

    Args:
        key: Key of times and noise.
        end: Where paths are at t = 1.
        sigma: Standard deviation that is left there.
        time_exponent: α of the density of t, ∝ t^α.
    """
    time_key, noise_key = jax.random.split(key)
    uniform = jax.random.uniform(time_key, end.shape[:1], end.dtype)
    # The inverse of the distribution function t^(1 + α).
    t = uniform ** (1 / (1 + time_exponent))
    noise = jax.random.normal(noise_key, end.shape, end.dtype)
    kept = 1 - sigma
    wide = t.reshape(-1, *(1,) * (end.ndim - 1))
    return t, (1 - kept * wide) * noise + wide * end, end - kept * noise
