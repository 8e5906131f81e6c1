"""A gate for adjoints: is the gradient good enough?"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from trainax_pk.adjoint._agreement import Agreement, agreement, of_leaves
from trainax_pk.adjoint._cost import compiled
from trainax_pk.adjoint._direct import DirectAdjoint

_DIRECT = DirectAdjoint()


class Calibration(eqx.Module):
    """What `assert_adjoint_calibrated` measured. `print` shows it.

    Attributes:
        total: Agreement with the reference over all leaves taken together.
        leaves: Agreement leaf by leaf, by the leaf's path.
    """

    total: Agreement
    leaves: dict[str, Agreement]

    def __str__(self) -> str:
        named = {"total": self.total, **self.leaves}
        return "\n".join(
            f"{name}: cosine {a.cosine:.4f}, norm ratio {a.norm_ratio:.4f}, "
            f"relative error {a.relative_error:.2e}"
            for name, a in named.items()
        )


def assert_adjoint_calibrated(
    loss_fn: Callable[..., Any],
    params: PyTree[Any],
    adjoint: Any,
    *,
    inputs: PyTree[Any] = None,
    wrt: str = "params",
    reference: Any = _DIRECT,
    min_cosine: float | None = 0.9,
    norm_ratio: tuple[float, float] | None = (0.1, 10.0),
    max_relative_error: float | None = None,
    every_leaf: bool = False,
) -> Calibration:
    """Fails if an adjoint's gradient is too far from a reference's.

    Each measure has a threshold of its own; None leaves it out. The defaults let a
    truncated adjoint pass that points the right way and is short. For an adjoint that
    should be exact pass `max_relative_error=1e-5`. What is not finite fails whatever
    the thresholds are.

    Args:
        loss_fn: `(params, adjoint) -> scalar`, or `(params, inputs, adjoint) ->
            scalar` if `inputs` are given.
        params: PyTree of the parameters.
        adjoint: The adjoint on trial; forward mode is not needed.
        inputs: PyTree of the loss's inputs (observations, initial states).
        wrt: `"params"` or `"inputs"`: what is differentiated.
        reference: The adjoint that is right.
        min_cosine: Least cosine between the two gradients.
        norm_ratio: Least and greatest |g| / |r|.
        max_relative_error: Greatest |g - r| / |r|.
        every_leaf: Whether every leaf has to pass, not only all of them together.

    Returns:
        What was measured.

    Raises:
        AssertionError: A threshold is missed or a gradient is not finite; the message
            names the leaf, the measure, its value and the threshold.
        ValueError: An unknown `wrt`, thresholds out of range, or `wrt="inputs"` without
            inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> from trainax_pk.adjoint import assert_adjoint_calibrated
        >>> def loss(a, adjoint):
        ...     return tx.rollout(lambda u: jnp.sin(a * u), 1.0, 9, adjoint=adjoint)[-1]
        >>> found = assert_adjoint_calibrated(loss, jnp.array(1.5), tx.KStepAdjoint(3))
        >>> found.total.cosine
        1.0
    """
    _check(wrt, inputs, min_cosine, norm_ratio, max_relative_error)
    if inputs is None:
        point, of_point = params, loss_fn
    elif wrt == "params":
        point, of_point = params, lambda p, a: loss_fn(p, inputs, a)
    else:
        point, of_point = inputs, lambda x, a: loss_fn(params, x, a)
    found, exact = (
        compiled(of_point, point, a).gradient() for a in (adjoint, reference)
    )
    result = Calibration(agreement(found, exact), of_leaves(found, exact))
    judged = {"all leaves": result.total}
    if every_leaf:
        judged |= result.leaves
    problems = [
        f"{name}: {problem}"
        for name, a in judged.items()
        for problem in _problems(a, min_cosine, norm_ratio, max_relative_error)
    ]
    if problems:
        raise AssertionError(
            f"Expected the gradient of {adjoint} with respect to {wrt} to agree with "
            f"that of {reference}, got " + "; ".join(problems) + ". Use a larger k or "
            "an exact adjoint, or change the thresholds."
        )
    return result


def _problems(
    a: Agreement,
    min_cosine: float | None,
    norm_ratio: tuple[float, float] | None,
    max_relative_error: float | None,
) -> list[str]:
    if a.cosine != a.cosine:
        return ["a gradient that is not finite"]
    problems = []
    if min_cosine is not None and not a.cosine >= min_cosine:
        problems.append(f"cosine {a.cosine:.3g} < {min_cosine}")
    if norm_ratio is not None and not norm_ratio[0] <= a.norm_ratio <= norm_ratio[1]:
        problems.append(f"norm ratio {a.norm_ratio:.3g} outside of {norm_ratio}")
    if max_relative_error is not None and not a.relative_error <= max_relative_error:
        problems.append(f"relative error {a.relative_error:.3g} > {max_relative_error}")
    return problems


def _check(
    wrt: str,
    inputs: Any,
    min_cosine: float | None,
    norm_ratio: tuple[float, float] | None,
    max_relative_error: float | None,
) -> None:
    if wrt not in ("params", "inputs"):
        raise ValueError(f"Expected `wrt` to be 'params' or 'inputs', got {wrt!r}.")
    if wrt == "inputs" and inputs is None:
        raise ValueError("Expected `inputs` for wrt='inputs', got None. Pass them.")
    if min_cosine is not None and not -1 <= min_cosine <= 1:
        raise ValueError(
            f"Expected `min_cosine` between -1 and 1, got {min_cosine}. Pass None to "
            "leave the cosine out."
        )
    if norm_ratio is not None and not 0 <= norm_ratio[0] <= norm_ratio[1]:
        raise ValueError(
            "Expected `norm_ratio` to be (least, greatest) with 0 <= least <= greatest, "
            f"got {norm_ratio}. Pass None to leave the norms out."
        )
    if max_relative_error is not None and not max_relative_error >= 0:
        raise ValueError(
            f"Expected `max_relative_error` >= 0, got {max_relative_error}. Pass None "
            "to leave it out."
        )
