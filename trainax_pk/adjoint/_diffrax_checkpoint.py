"""diffrax's checkpointed adjoint, where it is right."""

from typing import Any

import diffrax
import jax


class CheckedCheckpointAdjoint(diffrax.AbstractAdjoint):
    """`diffrax.RecursiveCheckpointAdjoint`, except where its gradient is wrong.

    With `ConstantStepSize`, gradients through `SaveAt(ts=...)` are off by tens of per
    cent for some numbers of checkpoints if save times are ends of steps, on JAX 0.10
    as well as 0.12. `probe_checkpointed_gradients` shows it. Such solves are refused.

    Attributes:
        checkpoints: The most states held at once, or None for diffrax's choice.

    Raises:
        ValueError: The solve is one of those; raised while it is traced.
    """

    checkpoints: int | None = None

    def loop(self, **kwargs: Any) -> Any:
        """Runs the solve as diffrax does."""
        if _at_given_times(**kwargs):
            raise ValueError(
                "Expected a solve that diffrax's checkpointed adjoint differentiates "
                "correctly, got fixed steps and SaveAt(ts=...): gradients can be wrong "
                "by 20 % and more. Use trainax_pk.adjoint.solve_ode with known t0, t1 "
                "and dt0, SaveAt(steps=...), DirectAdjoint(), or an adaptive step size."
            )
        return diffrax.RecursiveCheckpointAdjoint(self.checkpoints).loop(**kwargs)


def _at_given_times(
    saveat: diffrax.SaveAt, stepsize_controller: Any, **kwargs: Any
) -> bool:
    del kwargs
    is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)  # noqa: E731
    subs = jax.tree.leaves(saveat.subs, is_leaf=is_sub)
    fixed = isinstance(stepsize_controller, diffrax.ConstantStepSize)
    return fixed and any(sub.ts is not None for sub in subs)
