"""What trials are ranked by."""

from typing import Any

import jax

import trainax_pk.callback as callbacks
import trainax_pk.metrics as metrics
from trainax_pk.data import Split
from trainax_pk.step import TrainState


def objective(rank_by: str, configuration: Any, split: Split, *, use_ema: bool) -> Any:
    """`state -> scalar`, lower is better; it may be mapped over.

    Args:
        rank_by: "validation" or "rollout".
        configuration: Whose loss "validation" is.
        split: Its validation part is looked at.
        use_ema: Look at the moving average of the weights.
    """
    if rank_by == "validation":
        callback: Any = callbacks.Validation(
            configuration, split.validation, every=1, use_ema=use_ema
        )
    else:
        callback = callbacks.RolloutMetrics(
            split.validation, {"rollout": _geometric_mean}, every=1, use_ema=use_ema
        )

    def value(state: TrainState) -> jax.Array:
        found = callback(callbacks.Context(0, state, lambda: None))
        return found["rollout"] if rank_by == "rollout" else found

    return value


def _geometric_mean(prediction: Any, reference: Any) -> jax.Array:
    nrmse = metrics.nrmse_per_lead_time(prediction, reference)
    return metrics.geometric_mean(nrmse, horizon=min(100, len(nrmse)))
