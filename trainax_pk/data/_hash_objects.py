"""What objects hold, as far as Python can tell."""

import dataclasses
import enum
import functools
import inspect
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

_JITTED = type(jax.jit(lambda: None))
_DESCRIPTORS = (
    types.BuiltinFunctionType
    | types.MethodDescriptorType
    | types.WrapperDescriptorType
    | types.ClassMethodDescriptorType
)


class UnknownContent(TypeError):
    """An object whose content Python cannot tell."""


def is_plain(x: Any) -> bool:
    """Whether a value is known by its type and its text."""
    kinds = bool | int | float | complex | str | bytes | None | type(Ellipsis)
    exact = isinstance(x, kinds) and not isinstance(x, enum.Enum | np.generic)
    return exact or isinstance(x, slice | range | np.dtype | pathlib.PurePath)


def is_array(x: Any) -> bool:
    """Whether a value is an array; a traced one is refused."""
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            "Expected concrete values to hash, got a traced array. Hash outside of jit."
        )
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def is_sunder(name: str) -> bool:
    """Names that an enumeration keeps for itself."""
    return name.startswith("_") and name.endswith("_")


def is_data(name: str, value: Any, is_library: Callable[[str], bool]) -> bool:
    """Whether a class attribute is one that methods may compute with."""
    if name.startswith("__") or name in ("_abc_impl", "_fields"):
        return False
    kind = type(value)
    if isinstance(value, types.GenericAlias | types.UnionType) or (
        kind.__module__ == "typing"
    ):
        return False
    # Slots and the like; what they hold is the instance's.
    is_descriptor = hasattr(kind, "__get__") and not callable(value)
    return not (is_descriptor and is_library(kind.__module__))


def without_descriptor(value: Any) -> Any:
    """What a static or class method holds."""
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def functions(
    value: Any, is_library: Callable[[str], bool]
) -> Iterator[types.FunctionType]:
    """Functions behind a class attribute, whatever descriptor holds them."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, staticmethod | classmethod):
        yield from functions(value.__func__, is_library)
    elif isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from functions(part, is_library)
    elif not isinstance(value, type) and is_library(type(value).__module__):
        names = ("method", "func")
        # What else wraps is told with its settings.
        for name in (*names, "__wrapped__") if isinstance(value, _JITTED) else names:
            inner = inspect.getattr_static(value, name, None)
            if isinstance(inner, types.FunctionType):
                yield inner
                return


def home(x: Any) -> tuple[str, str]:
    """Module and qualified name."""
    module = getattr(x, "__module__", None)
    name = getattr(x, "__qualname__", None) or getattr(x, "__name__", None)
    if module is None and name is not None:
        module = type(x).__module__
    return str(module), str(name)


def named_in_library(x: Any, is_library: Callable[[str], bool]) -> bool:
    """A function object of a library: ufuncs, builtins, jitted functions."""
    if isinstance(x, _DESCRIPTORS | np.ufunc):
        return True
    module = getattr(x, "__module__", None)
    name = getattr(x, "__name__", None)
    if not callable(x) or not isinstance(module, str) or not isinstance(name, str):
        return False
    return "<locals>" not in home(x)[1] and is_library(module)


def settings(x: Any) -> dict[str, Any]:
    """What a wrapper of a library holds, without what is off."""
    if isinstance(x, _JITTED):
        # How a function is compiled, and where it stands in which file.
        return {}
    found = state(x) or {}
    if isinstance(x, types.FunctionType):
        for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # an empty cell
                continue
    skipped = _JITTED | inspect.Signature
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, skipped) and not _is_off(value)
    }


def state(x: Any) -> dict[str, Any] | None:
    """What an object holds, or None if Python cannot tell."""
    if isinstance(x, enum.Enum):
        return {"name": x.name}
    if isinstance(x, jax.ShapeDtypeStruct):
        return {"shape": x.shape, "dtype": np.dtype(x.dtype)}
    fields = [f.name for f in dataclasses.fields(x)] if _is_dataclass(x) else []
    slots = list(_slots(type(x)))
    if not (_is_dataclass(x) or hasattr(x, "__dict__") or slots):
        return {} if type(x) is object else None
    own = {
        name: value
        for name, value in getattr(x, "__dict__", {}).items()
        if not name.startswith("__") and not _is_cached(x, name)
    }
    named = {name: getattr(x, name) for name in [*fields, *slots] if hasattr(x, name)}
    return own | named


def _slots(cls: type) -> Iterable[str]:
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                yield f"_{base.__name__.lstrip('_')}{name}"
            elif not name.startswith("__"):
                yield name


def _is_dataclass(x: Any) -> bool:
    return dataclasses.is_dataclass(x) and not isinstance(x, type)


def _is_cached(x: Any, name: str) -> bool:
    """Whether an attribute is there because somebody has asked for it."""
    kind = inspect.getattr_static(type(x), name, None)
    return isinstance(kind, functools.cached_property)


def _is_off(value: Any) -> bool:
    empty = isinstance(value, tuple | dict | frozenset) and not value
    return value is None or value is False or empty
