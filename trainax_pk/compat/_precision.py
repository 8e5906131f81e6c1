"""trainax promotes states to the precision that steppers answer in."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def as_answered(data: PyTree[Array], *steppers: Any) -> PyTree[Array]:
    """The data in the precision that the steppers answer in, if that is higher.

    A loop keeps its dtype; unrolled, the first step would promote the state.
    """
    dtypes = {x.dtype for x in jax.tree.leaves((data, steppers)) if eqx.is_array(x)}
    if len(dtypes) < 2:
        return data
    for stepper in steppers:
        one = jax.tree.map(lambda x: x[0, 0], data)
        out = jax.eval_shape(stepper, one)
        if jax.tree.structure(out) == jax.tree.structure(one):
            data = jax.tree.map(
                lambda x, o: x.astype(jnp.promote_types(x.dtype, o.dtype)), data, out
            )
    return data
