"""Checks of the options of a step, before any compute."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import jax
import jax.numpy as jnp

from trainax_pk._tree import check_count
from trainax_pk.configuration._base import check_configuration
from trainax_pk.loss import BatchLoss
from trainax_pk.step._state import check_optimizer

NonFinite = Literal["raise", "skip", "ignore"]
# As "skip", where whoever runs many updates looks at the parameters after them: a look at
# each costs a twentieth of a small update. No text, so that nobody else asks for it.
SKIP_GRADIENT: Any = object()
_POLICIES = ("raise", "skip", "ignore")
_PRECISIONS = ("bfloat16", "float32", "float64")


def check_options(
    configuration: Any,
    optimizer: Any,
    accumulate: Any,
    max_grad_norm: Any,
    compute_dtype: Any,
) -> None:
    """What shapes the gradient."""
    check_configuration(configuration)
    check_optimizer(optimizer)
    check_count("accumulate", accumulate)
    if max_grad_norm is not None and not (_is_number(max_grad_norm, above=0)):
        raise ValueError(
            f"Expected `max_grad_norm` to be a number > 0, got {max_grad_norm!r}. "
            "Pass None for no clipping."
        )
    if compute_dtype is not None and _dtype_name(compute_dtype) not in _PRECISIONS:
        raise ValueError(
            "Expected `compute_dtype` to be bfloat16, float32 or float64, got "
            f"{compute_dtype!r}. float16 underflows without loss scaling: use bfloat16."
        )


def check_parts_of_batch(
    configuration: Any, accumulate: int, axis_name: str | None
) -> None:
    """A loss whose mean over parts of a batch is that of the batch."""
    option = "accumulate" if accumulate > 1 else "axis_name"
    if accumulate == 1 and axis_name is None:
        return
    nodes = jax.tree.leaves(configuration, is_leaf=lambda x: isinstance(x, BatchLoss))
    if any(isinstance(x, BatchLoss) for x in nodes):
        raise ValueError(
            f"Expected a loss of one sample with `{option}`, got a BatchLoss: the mean "
            "of its values over parts of a batch need not be its value of the batch. "
            f"Pass a function of one sample, or leave `{option}` out."
        )


def as_decays(ema_decay: Any) -> tuple[float, ...]:
    """The decays of the averages that are kept: none, one or several."""
    if ema_decay is None:
        return ()
    several = isinstance(ema_decay, Sequence) and not isinstance(ema_decay, str)
    decays = tuple(ema_decay) if several else (ema_decay,)
    if not decays or not all(_is_number(d, least=0, below=1) for d in decays):
        raise ValueError(
            f"Expected `ema_decay` to lie in [0, 1), got {ema_decay!r}. Pass for "
            "example 0.999, several as (0.99, 0.999), or None."
        )
    return decays


def check_policies(nonfinite: Any, axis_name: Any) -> None:
    """What happens around the update."""
    named = isinstance(nonfinite, str) and nonfinite in _POLICIES
    if not named and nonfinite is not SKIP_GRADIENT:
        raise ValueError(
            "Expected `nonfinite` to be 'raise', 'skip' or 'ignore', got "
            f"{nonfinite!r}. Choose one of them."
        )
    if not isinstance(axis_name, str | None):
        raise ValueError(
            f"Expected `axis_name` to be the name of a mapped axis, got {axis_name!r}. "
            "Pass the string given to pmap, shard_map's mesh or vmap."
        )


def _is_number(
    x: Any,
    *,
    above: float = -jnp.inf,
    least: float = -jnp.inf,
    below: float = jnp.inf,
) -> bool:
    if not isinstance(x, Real) or isinstance(x, bool):
        return False
    # Comparisons with NaN are false, so that it is refused.
    return bool(above < x < below and x >= least)


def _dtype_name(dtype: Any) -> str | None:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return None
