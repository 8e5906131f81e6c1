"""Transposes that are put off until something needs the order they make.

Convolutions written channels-last (`_convolution_forms.py`) stand between transposes of
all their activations. Between two of them lie activation functions, borders and sums,
for which any order of axes will do: there the order of the convolutions is kept, and
the transposes on the way out of one and into the next cancel.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

_ELEMENTWISE = frozenset(
    "abs add add_any and ceil clamp convert_element_type cos div eq erf exp exp2 expm1 "
    "floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not "
    "or pow rem round rsqrt select_n sign sin sqrt square sub tan tanh xor".split()
)
_REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"))
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
_REMAT = ("checkpoint", "remat", "remat2")
_BODIES = {"scan": "jaxpr", "while": "body_jaxpr", **dict.fromkeys(_REMAT, "jaxpr")}


@dataclasses.dataclass(frozen=True, eq=False)
class Put:
    """An array as it lies, and how its axes stand in the whole.

    Attributes:
        value: The entries, without axes of length 1.
        lying: All axes of the whole in the order in which `value` has them; where those
            of length 1 stand says where they would grow.
        shape: Of the whole.
        made: Transposes of `value` that were made already, by permutation.
    """

    value: jax.Array
    lying: tuple[int, ...]
    shape: tuple[int, ...]
    made: dict[tuple[int, ...], jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def axes(self) -> tuple[int, ...]:
        """For each axis of `value`, the axis it is of the whole."""
        return tuple(a for a in self.lying if self.shape[a] != 1)

    def arranged(self, order: Sequence[int]) -> jax.Array:
        """The axes `order` of the whole, in that order; those left out have length 1."""
        axes = self.axes
        permutation = tuple(axes.index(a) for a in order if a in axes)
        if permutation == tuple(range(self.value.ndim)):
            value = self.value
        elif permutation in self.made:
            value = self.made[permutation]
        else:
            value = self.made[permutation] = lax.transpose(self.value, permutation)
        return _reshaped(value, [self.shape[a] for a in order])

    def relabeled(self, lying: Sequence[int], shape: Sequence[int]) -> "Put":
        """The same entries under other names."""
        return Put(self.value, tuple(lying), tuple(shape), self.made)

    @property
    def whole(self) -> jax.Array:
        """The array itself."""
        return self.arranged(range(len(self.shape)))


def put_off_transposes(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Cancels a function's transposes where only elementwise work lies between them.

    Nested jit and custom JVP rules are dissolved where they stand in the way: for
    finished updates, after every derivative was taken. Bodies of loops are rewritten on
    their own. Values change by the order of sums alone.

    Args:
        fn: Takes and returns PyTrees of arrays.

    Returns:
        A function of the same signature, shapes and dtypes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.engine._transposes import put_off_transposes
        >>> def there_and_back(u):
        ...     return jnp.tanh(u.T + 1).T
        >>> jaxpr = jax.make_jaxpr(put_off_transposes(there_and_back))(jnp.ones((2, 3)))
        >>> [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]
        ['add', 'tanh']
    """

    @wraps(fn)
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        out = _run(closed.jaxpr, closed.consts, jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shapes), map(_whole, out))

    return rewritten


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates equation by equation; values are arrays or `Put`."""
    values: dict[Any, Any] = {}
    values |= zip(jaxpr.constvars, consts, strict=True)
    values |= zip(jaxpr.invars, args, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        values |= zip(eqn.outvars, _equation(eqn, operands), strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    put_off = any(isinstance(x, Put) for x in operands)
    if name in _CALLS and (put_off or _has_transposes(eqn.params[_CALLS[name]])):
        inner = eqn.params[_CALLS[name]]
        return _run(inner.jaxpr, inner.consts, operands)
    if name == "transpose" or put_off:
        rule = _RULES.get(name)
        results = None if rule is None else rule(eqn, operands)
        if results is not None:
            return results
    return _bound(eqn, [_whole(x) for x in operands])


def _bound(eqn: Any, operands: list[Any]) -> list[Any]:
    params = dict(eqn.params)
    name = eqn.primitive.name
    if name in _BODIES and not eqn.effects:
        params[_BODIES[name]] = _rewritten(params[_BODIES[name]])
    elif name == "cond" and not eqn.effects:
        params["branches"] = tuple(_rewritten(b) for b in params["branches"])
    params = eqn.primitive.get_bind_params(params)
    out = eqn.primitive.bind(*operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _rewritten(jaxpr: Any) -> Any:
    """A jaxpr with its transposes put off, of the same kind; itself if it has none."""
    if not _has_transposes(jaxpr):
        return jaxpr
    closed = isinstance(jaxpr, jex.ClosedJaxpr)
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    consts = jaxpr.consts if closed else []
    if not closed and inner.constvars:
        return jaxpr

    def flat(*args: Any) -> list[Any]:
        return [_whole(x) for x in _run(inner, consts, args)]

    new = jax.make_jaxpr(flat)(*(_like(v.aval) for v in inner.invars))
    if closed:
        return new
    return jaxpr if new.consts else new.jaxpr


def _has_transposes(jaxpr: Any) -> bool:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "transpose":
            return True
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, jex.Jaxpr | jex.ClosedJaxpr):
                    if _has_transposes(item):
                        return True
    return False


def _like(aval: Any) -> Any:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _put(value: jax.Array, lying: Sequence[int], shape: Sequence[int]) -> Put:
    """Axes of `value` in the order `lying`, whether or not those of length 1 are there."""
    long = [shape[a] for a in lying if shape[a] != 1]
    return Put(_reshaped(value, long), tuple(lying), tuple(shape))


def _as_put(x: Any) -> Put:
    if isinstance(x, Put):
        return x
    x = jnp.asarray(x)
    return _put(x, range(x.ndim), x.shape)


def _whole(x: Any) -> Any:
    return x.whole if isinstance(x, Put) else x


def _reshaped(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    return x if x.shape == tuple(shape) else lax.reshape(x, shape)


def _shape(eqn: Any) -> tuple[int, ...]:
    return eqn.outvars[0].aval.shape


def _long(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


# Rules: (equation, operands) -> values of its results, or None to do without.


def _transpose(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (x,) = map(_as_put, operands)
    permutation = eqn.params["permutation"]
    return [x.relabeled([permutation.index(a) for a in x.lying], _shape(eqn))]


def _relabel(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Reshapes, squeezes and broadcasts that only add or drop axes of length 1."""
    x, shape = operands[0], _shape(eqn)
    permuted = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    if len(operands) != 1 or permuted or _long(shape) != _long(x.shape):
        return None
    before = [i for i, size in enumerate(x.shape) if size != 1]
    after = [i for i, size in enumerate(shape) if size != 1]
    renamed = dict(zip(before, after, strict=True))
    short = [i for i, size in enumerate(shape) if size == 1]
    return [x.relabeled([*short, *(renamed[a] for a in x.axes)], shape)]


def _elementwise(eqn: Any, operands: list[Any]) -> list[Any] | None:
    shape = _shape(eqn)
    full = [x for x in operands if isinstance(x, Put) and x.shape == shape]
    if not full or any(
        len(jnp.shape(_shell(x))) not in (0, len(shape)) for x in operands
    ):
        return None
    order = full[0].axes
    sizes = tuple(shape[a] for a in order)

    def arranged(x: Any) -> Any:
        if len(jnp.shape(_shell(x))) == 0:  # A predicate, or the limits of a clamp.
            return x.whole if isinstance(x, Put) else x
        part = _as_put(x).arranged(order)
        return part if part.shape == sizes else jnp.broadcast_to(part, sizes)

    out = eqn.primitive.bind(*map(arranged, operands), **eqn.params)
    return [Put(out, full[0].lying, shape)]


def _shell(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32) if isinstance(x, Put) else x


def _reduce(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (x,) = operands
    gone = eqn.params["axes"]
    inner = tuple(sorted(x.axes.index(a) for a in gone if a in x.axes))
    value = eqn.primitive.bind(x.value, **(eqn.params | {"axes": inner}))
    kept = [a for a in range(len(x.shape)) if a not in gone]
    return [_put(value, [kept.index(a) for a in x.lying if a in kept], _shape(eqn))]


def _pad(eqn: Any, operands: list[Any]) -> list[Any] | None:
    x, fill = operands
    if not isinstance(x, Put):
        return None
    config = eqn.params["padding_config"]
    order = [a for a in x.lying if x.shape[a] != 1 or any(config[a])]
    value = lax.pad(x.arranged(order), _whole(fill), [config[a] for a in order])
    return [_put(value, x.lying, _shape(eqn))]


def _slice(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (x,) = operands
    params = eqn.params
    if 0 in _shape(eqn):
        return None
    strides = params["strides"] or (1,) * len(x.shape)
    bounds = [
        [values[a] for a in x.axes]
        for values in (params["start_indices"], params["limit_indices"], strides)
    ]
    return [_put(lax.slice(x.value, *bounds), x.lying, _shape(eqn))]


def _split(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (x,) = operands
    axis = eqn.params["axis"]
    if axis not in x.axes:
        return None
    parts = lax.split(x.value, eqn.params["sizes"], x.axes.index(axis))
    return [
        _put(part, x.lying, var.aval.shape)
        for part, var in zip(parts, eqn.outvars, strict=True)
    ]


def _concatenate(eqn: Any, operands: list[Any]) -> list[Any] | None:
    axis, shape = eqn.params["dimension"], _shape(eqn)
    lying = max(
        (x for x in operands if isinstance(x, Put)), key=lambda x: axis in x.axes
    ).lying
    # An axis of length 1 in the result may be of length 0 in a part.
    order = [a for a in lying if shape[a] != 1 or a == axis]
    parts = [_as_put(x).arranged(order) for x in operands]
    return [_put(lax.concatenate(parts, order.index(axis)), lying, shape)]


def _rev(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (x,) = operands
    inner = [x.axes.index(a) for a in eqn.params["dimensions"] if a in x.axes]
    return [Put(lax.rev(x.value, inner), x.lying, x.shape)]


def _dot_general(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Products without batch axes: both sides keep the order in which they lie."""
    contracted, batched = eqn.params["dimension_numbers"]
    if batched[0] or eqn.params.get("out_sharding") is not None:
        return None
    x, y = map(_as_put, operands)
    pairs = [(a, b) for a, b in zip(*contracted, strict=True) if a in x.axes]
    inner = (
        tuple(x.axes.index(a) for a, _ in pairs),
        tuple(y.axes.index(b) for _, b in pairs),
    )
    params = eqn.params | {"dimension_numbers": (inner, ((), ()))}
    value = eqn.primitive.bind(x.value, y.value, **params)
    free = [
        [a for a in range(len(z.shape)) if a not in gone]
        for z, gone in zip((x, y), contracted, strict=True)
    ]
    lying = [free[0].index(a) for a in x.lying if a in free[0]]
    lying += [len(free[0]) + free[1].index(a) for a in y.lying if a in free[1]]
    return [_put(value, lying, _shape(eqn))]


_RULES: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    "transpose": _transpose,
    "reshape": _relabel,
    "squeeze": _relabel,
    "broadcast_in_dim": _relabel,
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "rev": _rev,
    "dot_general": _dot_general,
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduce),
}
