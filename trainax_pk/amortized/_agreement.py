"""Do draws agree with those of a reference posterior?"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk.amortized._c2st import c2st


class PosteriorAgreement(eqx.Module):
    """How draws compare with a reference.

    Attributes:
        c2st: Accuracy of a classifier, 0.5 if nothing tells them apart.
        mean_shift: Difference of means, in standard deviations of the reference, `(d,)`.
        std_ratio: Standard deviations over those of the reference, `(d,)`.
    """

    c2st: Float[Array, ""]
    mean_shift: Float[Array, " d"]
    std_ratio: Float[Array, " d"]


def posterior_agreement(
    samples: Float[Array, "n d"],
    reference: Float[Array, "n d"],
    *,
    key: PRNGKeyArray,
    max_epochs: int = 1000,
) -> PosteriorAgreement:
    """Classifier accuracy, shifts of means and ratios of standard deviations.

    Args:
        samples: `(n, d)`.
        reference: `(n, d)`.
        key: Key of the classifier.
        max_epochs: Its limit.

    Returns:
        The report.

    Raises:
        ValueError: As `c2st`.

    Example:
        >>> import jax
        >>> import trainax_pk as tx
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 500, 2))
        >>> agreement = tx.amortized.posterior_agreement(
        ...     2 * x, y, key=jax.random.key(1), max_epochs=5
        ... )
        >>> [round(float(r)) for r in agreement.std_ratio]
        [2, 2]
    """
    accuracy = c2st(samples, reference, key=key, max_epochs=max_epochs)
    samples, reference = jnp.asarray(samples), jnp.asarray(reference)
    std = jnp.std(reference, axis=0)
    shift = (jnp.mean(samples, axis=0) - jnp.mean(reference, axis=0)) / std
    return PosteriorAgreement(accuracy, shift, jnp.std(samples, axis=0) / std)


def assert_posterior_agreement(
    samples: Float[Array, "n d"],
    reference: Float[Array, "n d"],
    *,
    key: PRNGKeyArray,
    max_c2st: float = 0.6,
    max_mean_shift: float = 0.2,
    max_std_ratio: float = 1.25,
    max_epochs: int = 1000,
) -> PosteriorAgreement:
    """`posterior_agreement` as a test.

    Args:
        samples: `(n, d)`.
        reference: `(n, d)`.
        key: Key of the classifier.
        max_c2st: Greatest accuracy that passes.
        max_mean_shift: Greatest shift of a mean, in standard deviations.
        max_std_ratio: Greatest ratio of standard deviations, and its inverse the least.
        max_epochs: Limit of the classifier.

    Returns:
        The report.

    Raises:
        AssertionError: A measure beyond its limit, or not a number; the message holds
            them all.
        ValueError: As `c2st`.

    Example:
        >>> import jax
        >>> import trainax_pk as tx
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 500, 2))
        >>> report = tx.amortized.assert_posterior_agreement(
        ...     x, y, key=jax.random.key(1), max_epochs=10
        ... )
        >>> bool(report.c2st < 0.6)
        True
    """
    report = posterior_agreement(samples, reference, key=key, max_epochs=max_epochs)
    shift = np.abs(np.asarray(report.mean_shift))
    ratio = np.asarray(report.std_ratio)
    # Written so that NaN fails.
    passes = (
        float(report.c2st) <= max_c2st
        and (shift <= max_mean_shift).all()
        and (ratio <= max_std_ratio).all()
        and (ratio >= 1 / max_std_ratio).all()
    )
    if not passes:
        raise AssertionError(
            f"Expected draws that agree with the reference, got C2ST "
            f"{float(report.c2st):.3f} (at most {max_c2st}), mean shifts "
            f"{shift.round(3)} (at most {max_mean_shift}) and ratios of standard "
            f"deviations {ratio.round(3)} (within {1 / max_std_ratio:.3f} to "
            f"{max_std_ratio}). Train longer or on more simulations, or look at "
            "simulation_based_calibration."
        )
    return report
