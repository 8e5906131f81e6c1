"""What makes a run the run it is, field by field, and how two are compared."""

import dataclasses
import hashlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainax_pk.data import hash_content
from trainax_pk.data._hash_code import is_library_file

# Arrays beyond this are read in part: blocks at even distances.
_WHOLE = 2**30
_BLOCK = 2**20
_NUM_BLOCKS = 256
_SHOWN = 12

Fields = dict[str, str]


class RunChanged(ValueError):
    """A run is continued with something that it was not begun with.

    Attributes:
        fields: Names of the fields that differ.

    Example:
        >>> from trainax_pk.checkpoint import RunChanged
        >>> RunChanged("batch_size: 8 was saved, now 16", ["batch_size"]).fields
        ['batch_size']
    """

    def __init__(self, message: str, fields: list[str]) -> None:
        super().__init__(message)
        self.fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        # Left to itself, pickle would call the class with the message alone.
        return type(self), (*self.args, self.fields), self.__dict__


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run is made of, as text.

    Attributes:
        must: Fields that determine its numbers: a change is refused.
        may: Fields that may change on the way: a change is logged. What is in neither
            does not matter.
    """

    must: Fields
    may: Fields

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"must": self.must, "may": self.may}

    def changes(self, saved: Mapping[str, Any]) -> tuple[Fields, Fields]:
        """Fields that differ from saved ones, `name -> "old -> new"`.

        Args:
            saved: What `to_json` gave.

        Returns:
            Those that must match, and those that may change.
        """
        return _difference(saved["must"], self.must), _difference(
            saved["may"], self.may
        )


def check_unchanged(must: Fields, leaves: Fields, allowed: Iterable[str]) -> Fields:
    """Refuses changes that were not allowed.

    Args:
        must: Changed fields, with their changes.
        leaves: Leaves of the state that do not fit, which nothing can allow.
        allowed: Beginnings of the names of fields that may change this time.

    Returns:
        The changes that were allowed.

    Raises:
        RunChanged: Naming fields or leaves, old and new.
    """
    allowed = tuple(allowed)
    refused = {
        name: change
        for name, change in must.items()
        if not any(_begins(name, prefix) for prefix in allowed)
    }
    if refused or leaves:
        lines = [f"{name}: {change}" for name, change in (refused | leaves).items()]
        more = len(lines) - _SHOWN
        shown = "\n  ".join(lines[:_SHOWN]) + (
            f"\n  and {more} more" if more > 0 else ""
        )
        remedy = (
            "Such a state cannot be continued: begin in another run_dir."
            if leaves
            else "Begin in another run_dir, or allow it by the field's name: "
            f"allow_changes=({sorted({n.split('.')[0] for n in refused})[0]!r},)."
        )
        raise RunChanged(
            f"Expected the run that was begun in this run_dir, got changes:\n  {shown}\n"
            f"{remedy}",
            list(refused),
        )
    return dict(must)


def describe(x: Any, name: str) -> Fields:
    """An object as a flat table of text: plain values as they are, the rest by digest.

    Numbers inside a library's closures, such as the learning rate in an optimizer, are
    found and named. Code of the user counts by its content; installed packages and this
    one by name, so that an upgrade is no change.
    """
    fields: Fields = {}
    _describe(x, name, fields, ())
    return fields


def _describe(x: Any, name: str, fields: Fields, above: tuple[int, ...]) -> None:
    if id(x) in above:
        fields[name] = "as above"
        return
    parts = _parts(x)
    if parts is None:
        fields[name] = _text(x)
        return
    kind, children = parts
    if kind:
        fields[name] = kind
    for child, value in children:
        _describe(value, f"{name}{child}", fields, (*above, id(x)))


def _parts(x: Any) -> tuple[str, list[tuple[str, Any]]] | None:
    """What an object is and is made of; None for what is described as a whole."""
    if callable(getattr(x, "content_hash", None)) or isinstance(x, type):
        return None
    if isinstance(x, Mapping):
        return "", [(f"[{k!r}]", v) for k, v in x.items()]
    if isinstance(x, tuple | list):
        names = getattr(x, "_fields", None)
        labels = (
            [f".{n}" for n in names] if names else [f"[{i}]" for i in range(len(x))]
        )
        return "", list(zip(labels, x, strict=True))
    if isinstance(x, types.FunctionType):
        return _closure(x)
    if dataclasses.is_dataclass(x):
        own = [f.name for f in dataclasses.fields(x) if hasattr(x, f.name)]
        return _code(type(x)), [(f".{n}", getattr(x, n)) for n in own]
    plain_object = type(x).__module__ != "builtins" and not _is_leaf(x)
    if plain_object and hasattr(x, "__dict__") and not callable(x):
        return _code(type(x)), [(f".{n}", v) for n, v in sorted(vars(x).items())]
    return None


def _closure(f: types.FunctionType) -> tuple[str, list[tuple[str, Any]]] | None:
    """A function that a package made around values; None for any other."""
    if not f.__closure__ or not is_library_file(f.__code__.co_filename, own=True):
        return None
    cells = zip(f.__code__.co_freevars, f.__closure__, strict=True)
    return _home(f), [(f".{name}", cell.cell_contents) for name, cell in cells]


def _is_leaf(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | np.dtype)


def _text(x: Any) -> str:
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return _array_text(x)
    if isinstance(x, bool | int | float | complex | str | None | np.dtype):
        return repr(x)
    try:
        content = hash_content(x, versions=False)[:16]
    except TypeError:
        return f"{_home(type(x))}, which cannot be compared"
    return f"{_home(x)} {content}"


def _array_text(x: Any) -> str:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return f"{jax.random.key_impl(x)} {jax.random.key_data(x).tolist()}"
    head = f"{np.dtype(x.dtype).name}{list(x.shape)}"
    if x.size <= 4:
        return f"{head} {np.asarray(x).tolist()}"
    return f"{head} {_array_digest(x)}"


def _array_digest(x: Any) -> str:
    sha = hashlib.sha256()
    if x.nbytes <= _WHOLE:
        sha.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        return sha.hexdigest()[:16]
    # A memory map larger than memory is not read whole before the first update.
    rows = max(1, _BLOCK * x.shape[0] // x.nbytes)
    for start in np.linspace(0, x.shape[0] - rows, _NUM_BLOCKS).astype(int):
        block = np.ascontiguousarray(x[int(start) : int(start) + rows])
        sha.update(block.reshape(-1).view(np.uint8))
    return sha.hexdigest()[:16]


def _code(cls: type) -> str:
    try:
        return f"{_home(cls)} {hash_content(cls, versions=False)[:16]}"
    except TypeError:
        return _home(cls)


def _home(x: Any) -> str:
    name = getattr(x, "__qualname__", None) or type(x).__qualname__
    module = getattr(x, "__module__", None) or type(x).__module__
    return f"{module}.{name}"


def _difference(old: Mapping[str, str], new: Mapping[str, str]) -> Fields:
    names = [*old, *(n for n in new if n not in old)]
    return {
        name: f"{old.get(name, 'nothing')} was saved, now {new.get(name, 'nothing')}"
        for name in names
        if not _same(old.get(name), new.get(name))
    }


def _same(old: str | None, new: str | None) -> bool:
    if old == new:
        return True
    # Optax turns the counts in some schedules into floats when these are first used.
    try:
        return float(old) == float(new)
    except (TypeError, ValueError):
        return False


def _begins(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith((f"{prefix}.", f"{prefix}["))
