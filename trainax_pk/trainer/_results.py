"""What callbacks return, in the form in which it is kept and compared."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import PyTree


def as_result(name: str, value: PyTree[Any]) -> PyTree[Any]:
    """Numbers and arrays as arrays of JAX; what is neither as it is.

    Numbers inside a module stay numbers: they are its settings, such as a dropout's
    rate, and no result.

    Args:
        name: Of the callback.
        value: What it returned.

    Raises:
        ValueError: A number that no array can hold.
    """

    def convert(x: Any) -> Any:
        if isinstance(x, eqx.Module):
            return jax.tree.map(lambda y: jnp.asarray(y) if _is_array(y) else y, x)
        return jnp.asarray(x) if _is_array(x) or _is_number(x) else x

    try:
        return jax.tree.map(convert, value, is_leaf=lambda x: isinstance(x, eqx.Module))
    except OverflowError as error:
        raise ValueError(
            f"Expected the callback {name!r} to return numbers that an array can hold, "
            f"got {value!r}. Return a float."
        ) from error


def check_like(name: str, step: int, value: PyTree[Any], first: PyTree[Any]) -> None:
    """Results that can be stacked, or a ValueError: better early than after the run.

    Args:
        name: Of the callback.
        step: Number of updates done.
        value: What it returned, converted.
        first: What it returned first.
    """
    got, expected = _forms(value), _forms(first)
    if jax.tree.structure(value) == jax.tree.structure(first):
        changed = [p for p, form in got.items() if not _is_same(form, expected[p])]
        got, expected = ({p: d[p] for p in changed} for d in (got, expected))
        if not changed:
            return
    raise ValueError(
        f"Expected the callback {name!r} to return the same structure, shapes and "
        f"dtypes every time, got {_text(got)} after {step} updates, but {_text(expected)} "
        "before. Pad what grows, and keep what is neither number nor array elsewhere."
    )


def _forms(value: PyTree[Any]) -> dict[str, Any]:
    return {
        keystr(path): f"{x.dtype}{list(x.shape)}" if eqx.is_array(x) else x
        for path, x in tree_leaves_with_path(value)
    }


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _text(forms: dict[str, Any]) -> str:
    parts = [f"{path} {form}".strip() for path, form in forms.items()]
    return ", ".join(parts) or "nothing"


def _is_number(x: Any) -> bool:
    return isinstance(x, bool | int | float | complex)


def _is_array(x: Any) -> bool:
    if isinstance(x, jax.Array):
        return True
    numeric = isinstance(x, np.ndarray | np.generic)
    return numeric and (
        jnp.issubdtype(x.dtype, np.number) or jnp.issubdtype(x.dtype, np.bool_)
    )
