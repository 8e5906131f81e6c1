"""What looks at training on the way, by name."""

from typing import Any, Literal

import equinox as eqx

import trainax_pk.callback as callbacks
import trainax_pk.metrics as metrics
from trainax_pk.data import Split
from trainax_pk.experiment._data import Count
from trainax_pk.experiment._spec import AbstractSpec, register


class AbstractCallbackSpec(AbstractSpec):
    """A callback: `build(configuration, split)`, on the validation trajectories."""

    every: Count


@register("callback")
class Validation(AbstractCallbackSpec):
    """`tx.callback.Validation`: the mean loss on validation trajectories."""

    kind: Literal["validation"] = "validation"
    use_ema: bool = False

    def build(self, configuration: Any, split: Split) -> Any:
        """The callback."""
        held_out = split.validation
        return callbacks.Validation(
            configuration, held_out, every=self.every, use_ema=self.use_ema
        )


class GeometricMean(eqx.Module):
    """Geometric mean of the nRMSE over lead times; equal ones are compiled once.

    Attributes:
        horizon: Over so many; None for all.
    """

    horizon: int | None = eqx.field(static=True)

    def __call__(self, prediction: Any, reference: Any) -> Any:
        """The mean."""
        nrmse = metrics.nrmse_per_lead_time(prediction, reference)
        return metrics.geometric_mean(nrmse, horizon=self.horizon)


@register("callback")
class Rollout(AbstractCallbackSpec):
    """`tx.callback.RolloutMetrics`: nRMSE by lead time, and its geometric mean over the
    first `horizon` leads, by default all."""

    kind: Literal["rollout"] = "rollout"
    horizon: Count | None = None
    use_ema: bool = False

    def build(self, configuration: Any, split: Split) -> Any:
        """The callback."""
        del configuration
        mean = GeometricMean(self.horizon)
        return callbacks.RolloutMetrics(
            split.validation,
            {"nrmse": metrics.nrmse_per_lead_time, "geometric_mean": mean},
            every=self.every,
            use_ema=self.use_ema,
        )


@register("callback")
class WeightNorm(AbstractCallbackSpec):
    """`tx.callback.WeightNorm`."""

    kind: Literal["weight_norm"] = "weight_norm"

    def build(self, configuration: Any, split: Split) -> Any:
        """The callback."""
        del configuration, split
        return callbacks.WeightNorm(self.every)


@register("callback")
class GradNorm(AbstractCallbackSpec):
    """`tx.callback.GradNorm`."""

    kind: Literal["grad_norm"] = "grad_norm"

    def build(self, configuration: Any, split: Split) -> Any:
        """The callback."""
        del split
        return callbacks.GradNorm(configuration, self.every)
