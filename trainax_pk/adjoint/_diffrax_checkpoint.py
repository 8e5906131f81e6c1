"""diffrax's checkpointed adjoint, where it is right."""

from typing import Any

import diffrax
import jax

# Where wrong gradients were found: JAX 0.12, fixed steps, save times on step ends.
_FIRST_WRONG = (0, 12)


class CheckedCheckpointAdjoint(diffrax.AbstractAdjoint):
    """`diffrax.RecursiveCheckpointAdjoint`, except where its gradient is wrong.

    With JAX 0.12 and `ConstantStepSize`, gradients through `SaveAt(ts=...)` are off by
    up to 20 % for some numbers of checkpoints if save times are ends of steps.
    `probe_checkpointed_gradients` shows it. Such solves are refused.

    Attributes:
        checkpoints: The most states held at once, or None for diffrax's choice.

    Raises:
        ValueError: The solve is one of those; raised while it is traced.
    """

    checkpoints: int | None = None

    def loop(self, **kwargs: Any) -> Any:
        """Runs the solve as diffrax does."""
        if jax.__version_info__[:2] >= _FIRST_WRONG and _at_given_times(**kwargs):
            raise ValueError(
                "Expected a solve that diffrax's checkpointed adjoint differentiates "
                f"correctly, got fixed steps and SaveAt(ts=...) on JAX "
                f"{jax.__version__}: gradients can be wrong by 20 %. Use "
                "trainax_pk.adjoint.solve_ode with known t0, t1 and dt0, SaveAt(steps="
                "...), DirectAdjoint(), or an adaptive step size."
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
