"""Posteriors of learned likelihoods and ratios, by Markov chains of blackjax."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._extras import load
from trainax_pk._tree import check_count, is_concrete
from trainax_pk.amortized._head import typed_key
from trainax_pk.amortized._likelihood import AmortizedLikelihood, AmortizedRatio
from trainax_pk.amortized._pairs import as_observation, check_observations
from trainax_pk.amortized._posterior import from_standard
from trainax_pk.amortized._support import Support, support_of

# Candidates that are judged at once.
_BLOCK = 10_000


class Chains(eqx.Module):
    """What Markov chains returned.

    Attributes:
        samples: All chains one after another, leaves `(num_chains · n, ...)`.
        r_hat: Potential scale reduction of each parameter, `(d,)`; near 1 where chains
            agree. Chains in separate modes that do not mix read high. NaN of one draw of
            each chain.
        acceptance: Mean acceptance probability.
        num_divergent: Number of divergent transitions after the warm-up.
    """

    samples: PyTree[Array]
    r_hat: Float[Array, " d"]
    acceptance: Float[Array, ""]
    num_divergent: Array


def sample_posterior(
    model: AmortizedLikelihood | AmortizedRatio,
    prior: Any,
    x: Float[Array, "..."],
    num_samples: int,
    *,
    key: PRNGKeyArray,
    mask: Any = None,
    num_chains: int = 100,
    num_warmup: int = 150,
    num_candidates: int = 10_000,
    max_doublings: int = 6,
) -> Chains:
    """Draws of p(θ | x) ∝ p(θ) q(x | θ), or p(θ) r(θ, x), by the no-U-turn sampler.

    Chains run vmapped in z, where the support has no bounds, with the transform's
    determinant in the density. They start from draws of the prior that are resampled by
    their likelihood, so that each mode is entered by as many chains as its mass asks for;
    each adapts its own step and metric. Cost: a gradient of the density per chain and
    leapfrog step, at most 2^max_doublings of them per transition.

    Args:
        model: Learned likelihood or ratio.
        prior: With `sample(key)`, `log_prob(theta)` and the model's bounds, or narrower
            ones: transitions that meet these count as divergent.
        x: One observation.
        num_samples: Draws in total, a multiple of `num_chains`.
        key: Key.
        mask: Which entries were observed, for a ratio.
        num_chains: Chains that run side by side.
        num_warmup: Transitions of each that adapt it and are dropped.
        num_candidates: Draws of the prior that starts are resampled from.
        max_doublings: Limit of a trajectory's doublings.

    Returns:
        Draws, and what tells whether to trust them.

    Raises:
        ValueError: A model that is neither, a prior without density or with bounds beyond
            the model's, counts out of range, an observed entry that is not finite.
        ImportError: blackjax is not installed.

    Source: Hoffman & Gelman 2014, arXiv:1111.4246.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> prior = tx.data.Normal(jnp.zeros(2), 1.0)
        >>> likelihood = tx.amortized.AmortizedLikelihood(
        ...     tx.amortized.DiagonalGaussian(3, 2, key=jax.random.key(0)),
        ...     prior=prior, shape=(3,),
        ... )
        >>> sample = lambda x: tx.amortized.sample_posterior(
        ...     likelihood, prior, x, 40, key=jax.random.key(1), num_chains=4
        ... )
        >>> chains = jax.eval_shape(sample, jnp.ones(3))  # sample(x) runs it
        >>> chains.samples.shape, chains.r_hat.shape
        ((40, 2), (2,))
    """
    if not isinstance(model, AmortizedLikelihood | AmortizedRatio):
        raise ValueError(
            f"Expected an AmortizedLikelihood or AmortizedRatio, got "
            f"{type(model).__name__}. A posterior samples by itself: model.sample(...)."
        )
    if not callable(getattr(prior, "log_prob", None)):
        raise ValueError(
            f"Expected a prior with `log_prob(theta)`, got {prior!r}. Pass the prior that "
            "the simulations were drawn from."
        )
    for name, value in (("num_samples", num_samples), ("num_warmup", num_warmup)):
        check_count(name, value)
    check_count("num_chains", num_chains, minimum=2)
    check_count("num_candidates", num_candidates, minimum=num_chains)
    check_count("max_doublings", max_doublings)
    x = as_observation(x)
    check_observations(x, mask)
    if num_samples % num_chains:
        raise ValueError(
            f"Expected `num_samples` to be a multiple of num_chains={num_chains}, got "
            f"{num_samples}. Pass {num_chains * -(-num_samples // num_chains)}."
        )
    _check_bounds(model.support, prior)
    blackjax = load("blackjax", "amortized")
    counts = (num_chains, num_warmup, num_samples // num_chains, num_candidates)
    with jax.numpy_rank_promotion("allow"):
        return _run(
            blackjax, model, prior, x, mask, typed_key(key), counts, max_doublings
        )


def _check_bounds(support: Support, prior: Any) -> None:
    """A prior that lives within where the model was trained, or a ValueError."""
    own = support_of(prior)
    if (own.structure, own.shapes) != (support.structure, support.shapes):
        raise ValueError(
            f"Expected a prior of parameters {support.structure} of the shapes "
            f"{support.shapes}, got {own.structure} of {own.shapes}. Pass the prior that "
            "the model was built with."
        )
    bounds = [s.value for s in (support.low, own.low, support.high, own.high)]
    if not all(map(is_concrete, bounds)):
        return
    low, own_low, high, own_high = (np.asarray(x, np.float64) for x in bounds)
    # Nearly: one may have been rounded to another precision.
    finite = np.where(np.isfinite([low, high]), [low, high], 0.0)
    width = np.where(np.isfinite(high - low), high - low, 0.0)
    slack = 1e-6 * width[None] + np.finfo(np.float32).eps * np.abs(finite)
    if np.any((own_low < low - slack[0]) | (own_high > high + slack[1])):
        raise ValueError(
            f"Expected a prior within the model's bounds {bounds[0]} and {bounds[2]}, got "
            f"{bounds[1]} and {bounds[3]}: outside of them the model tells nothing. Pass "
            "the prior that it was built with, or a narrower one."
        )


@eqx.filter_jit
def _run(
    blackjax: Any,
    model: Any,
    prior: Any,
    x: Array,
    mask: Any,
    key: PRNGKeyArray,
    counts: tuple[int, int, int, int],
    max_doublings: int,
) -> Chains:
    num_chains, num_warmup, num_kept, num_candidates = counts
    support = model.support
    evidence = model.log_ratio if isinstance(model, AmortizedRatio) else model.log_prob

    def density(z: Array) -> Array:
        free = model.theta_scale.inverse(z)
        theta = from_standard(support, model.theta_scale, z)
        slope = support.log_slope(free)
        return evidence(theta, x, mask) + prior.log_prob(theta) + slope

    start_key, chain_key = jax.random.split(key)
    starts = _starts(
        model, prior, evidence, x, mask, start_key, num_chains, num_candidates
    )

    def chain(key: PRNGKeyArray, z: Array) -> Any:
        warm_key, run_key = jax.random.split(key)
        warmup = blackjax.window_adaptation(
            blackjax.nuts, density, max_num_doublings=max_doublings
        )
        (state, parameters), _ = warmup.run(warm_key, z, num_warmup)
        kernel = blackjax.nuts(density, **parameters)

        def step(state: Any, key: PRNGKeyArray) -> tuple[Any, Any]:
            state, info = kernel.step(key, state)
            return state, (state.position, info.acceptance_rate, info.is_divergent)

        return jax.lax.scan(step, state, jax.random.split(run_key, num_kept))[1]

    keys = jax.random.split(chain_key, num_chains)
    z, acceptance, divergent = jax.vmap(chain)(keys, starts)
    rows = z.reshape(-1, z.shape[-1])
    to_theta = lambda z: from_standard(support, model.theta_scale, z)  # noqa: E731
    r_hat = blackjax.diagnostics.potential_scale_reduction(z)
    return Chains(
        jax.vmap(to_theta)(rows), r_hat, jnp.mean(acceptance), jnp.sum(divergent)
    )


def _starts(
    model: Any,
    prior: Any,
    evidence: Any,
    x: Array,
    mask: Any,
    key: PRNGKeyArray,
    num_chains: int,
    num_candidates: int,
) -> Float[Array, "chains d"]:
    """Draws of the prior, resampled by their likelihood.

    Systematically, orthant by orthant around their weighted mean: n starts hold n p of an
    orthant of mass p, rounded, where independent picks would vary by √(n p (1 − p)). What
    chains that stay in their mode return of it depends on that alone.
    """
    draw_key, pick_key = jax.random.split(key)

    def candidate(key: PRNGKeyArray) -> tuple[Array, Array]:
        theta = prior.sample(key)
        z, _ = model.support.unconstrain(model.support.ravel(theta))
        return model.theta_scale(z), evidence(theta, x, mask)

    keys = jax.random.split(draw_key, num_candidates)
    z, logits = jax.lax.map(candidate, keys, batch_size=_BLOCK)
    weights = jnp.exp(logits - jnp.max(logits))
    mean = (weights @ z) / jnp.sum(weights)
    digits = 2 ** jnp.arange(min(z.shape[1], 30))
    orthant = jnp.sum(jnp.where(z > mean[None], 1, 0)[:, :30] * digits[None], axis=1)
    order = jnp.argsort(orthant)
    total = jnp.cumsum(weights[order])
    offset = jax.random.uniform(pick_key, (), total.dtype)
    rungs = (jnp.arange(num_chains, dtype=total.dtype) + offset) / num_chains
    picked = jnp.searchsorted(total, rungs * total[-1])
    # Rounding can place the last rung at the very end.
    return z[order[jnp.minimum(picked, num_candidates - 1)]]
