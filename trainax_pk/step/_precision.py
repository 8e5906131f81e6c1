"""Models that compute in another precision than their states have."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from trainax_pk._stepper import Stepper
from trainax_pk._tree import cast_floating, is_floating


def in_precision(model: Any, dtype: Any) -> Any:
    """The model, computing in `dtype` and answering in the precision of its input."""
    if dtype is None:
        return model
    if isinstance(model, Stepper):
        return eqx.tree_at(
            lambda m: m.module, model, _LowPrecision(model.module, dtype)
        )
    return _LowPrecision(model, dtype)


class _LowPrecision(eqx.Module):
    module: Any
    dtype: Any = eqx.field(static=True)

    def __call__(self, u: PyTree[Array], *args: Any, **kwargs: Any) -> Any:
        stateful = any(isinstance(a, eqx.nn.State) for a in args)
        module, low = cast_floating((self.module, u), self.dtype)
        # Running statistics move by less than bfloat16 can resolve: they stay.
        args = [
            a if isinstance(a, eqx.nn.State) else cast_floating(a, self.dtype)
            for a in args
        ]
        out = module(low, *args, **kwargs)
        if stateful:
            return _like(out[0], u), out[1]
        return _like(out, u)


def _like(out: PyTree[Any], u: PyTree[Array]) -> PyTree[Any]:
    if jax.tree.structure(out) != jax.tree.structure(u):
        return out  # Refused where the result is compared with the state.
    return jax.tree.map(
        lambda o, x: o.astype(x.dtype) if is_floating(o) and is_floating(x) else o,
        out,
        u,
    )
