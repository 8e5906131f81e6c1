"""Replacing equations of a jaxpr, however deep they lie in its loops and calls."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core as jex

# (equation) -> the function of its operands to put in its place, or None to keep it.
Replacement = Callable[[Any], Callable[..., Any] | None]

# Primitives whose inner jaxprs XLA compiles as a computation of their own, out of reach
# of the passes that only visit the program's entry.
_APART = frozenset({"scan", "while", "cond"})


def replace_equations(jaxpr: Any, replacement: Replacement) -> Any:
    """Puts new equations in the place of old ones, through every nested jaxpr.

    Nothing is traced again but the replacements: variables, effects, checkpoint (remat)
    equations with their barriers, donated arguments, custom rules and every other
    parameter stay as they are.

    Args:
        jaxpr: Open or closed jaxpr.
        replacement: Says for one equation of one output what stands in for it. The
            stand-in must return the same shape, dtype and weak type, else the equation
            is kept.

    Returns:
        A jaxpr of the same kind; the very same object where nothing was replaced.

    Example:
        >>> import jax
        >>> from trainax_pk.engine._jaxpr import replace_equations
        >>> jaxpr = jax.make_jaxpr(lambda x: jax.lax.sin(x) + 1)(jax.numpy.ones(()))
        >>> new = replace_equations(
        ...     jaxpr, lambda e: jax.lax.cos if e.primitive.name == "sin" else None
        ... )
        >>> [eqn.primitive.name for eqn in new.jaxpr.eqns]
        ['cos', 'add']
    """
    return _Rewriter(replacement)(jaxpr)


def walk_equations(jaxpr: Any, *, in_loop: bool = False) -> Iterator[tuple[Any, bool]]:
    """Yields every equation of a jaxpr, and whether it lies in a loop or a branch.

    Args:
        jaxpr: Open or closed jaxpr.
        in_loop: What to say of the outermost equations.

    Yields:
        `(equation, in_loop)`, outer before inner.

    Example:
        >>> import jax
        >>> from trainax_pk.engine._jaxpr import walk_equations
        >>> def sines(x):
        ...     y, _ = jax.lax.scan(lambda c, _: (jax.numpy.sin(c), None), x, length=3)
        ...     return jax.numpy.cos(y)
        >>> [
        ...     (eqn.primitive.name, in_loop)
        ...     for eqn, in_loop in walk_equations(jax.make_jaxpr(sines)(0.0))
        ... ]
        [('scan', False), ('sin', True), ('cos', False)]
    """
    for eqn in _open(jaxpr).eqns:
        yield eqn, in_loop
        inside = in_loop or eqn.primitive.name in _APART
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if _is_jaxpr(item):
                    yield from walk_equations(item, in_loop=inside)


class _Rewriter:
    def __init__(self, replacement: Replacement) -> None:
        self._replacement = replacement
        # A jaxpr that is called twice stays one jaxpr. The old one is held too, lest
        # its id be given to another.
        self._done: dict[int, tuple[Any, Any]] = {}

    def __call__(self, jaxpr: Any) -> Any:
        if id(jaxpr) not in self._done:
            self._done[id(jaxpr)] = (jaxpr, self._rewrite(jaxpr))
        return self._done[id(jaxpr)][1]

    def _rewrite(self, jaxpr: Any) -> Any:
        inner = _open(jaxpr)
        eqns, changed = [], False
        for eqn in inner.eqns:
            new = self._equations(eqn)
            changed = changed or new[0] is not eqn
            eqns.extend(new)
        if not changed:
            return jaxpr
        inner_new = inner.replace(eqns=eqns)
        # Up to JAX 0.11 a closed jaxpr wraps an open one; later there is one kind.
        return inner_new if inner is jaxpr else jaxpr.replace(jaxpr=inner_new)

    def _equations(self, eqn: Any) -> list[Any]:
        function = self._replacement(eqn)
        if function is not None:
            return _inlined(eqn, function) or [eqn]
        params = {name: self._param(value) for name, value in eqn.params.items()}
        if all(params[name] is value for name, value in eqn.params.items()):
            return [eqn]
        return [eqn.replace(params=params)]

    def _param(self, value: Any) -> Any:
        if _is_jaxpr(value):
            return self(value)
        if type(value) in (tuple, list) and any(map(_is_jaxpr, value)):
            new = type(value)(self(v) if _is_jaxpr(v) else v for v in value)
            if any(a is not b for a, b in zip(new, value, strict=True)):
                return new
        return value


def _inlined(eqn: Any, function: Callable[..., Any]) -> list[Any]:
    """The equations of `function` between the variables of `eqn`; empty if it differs."""
    avals = [atom.aval for atom in eqn.invars]
    traced = jax.make_jaxpr(function)(
        *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
    )
    inner = _open(traced)
    (old,), (new,) = eqn.outvars, inner.outvars
    same = all(
        getattr(old.aval, field) == getattr(new.aval, field)
        for field in ("shape", "dtype", "weak_type")
    )
    if traced.consts or not same or not isinstance(new, jex.Var) or new in inner.invars:
        return []
    # Fresh variables: a traced function may be cached and come back with the same ones.
    names = dict(zip(inner.invars, eqn.invars, strict=True)) | {new: old}

    def name(atom: Any) -> Any:
        if isinstance(atom, jex.Literal):
            return atom
        if atom not in names:
            names[atom] = jex.Var(atom.aval)
        return names[atom]

    return [
        inner_eqn.replace(
            invars=[name(v) for v in inner_eqn.invars],
            outvars=[name(v) for v in inner_eqn.outvars],
            source_info=eqn.source_info,
            ctx=eqn.ctx,
        )
        for inner_eqn in inner.eqns
    ]


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)
