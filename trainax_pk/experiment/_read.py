"""From YAML to typed objects, with every problem at its line."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from trainax_pk.experiment._spec import problems, unknown_fields
from trainax_pk.experiment._yaml import (
    Document,
    RunFileError,
    read_file,
    read_text,
)

# Fields that name a file, relative to the file that they stand in.
_PATHS = ("path",)
Root = TypeVar("Root", bound=pydantic.BaseModel)


def read_document(
    source: str | Path, overrides: Sequence[str] = (), *, name: str = ""
) -> Document:
    """Fields of a YAML file, or of a text, with some replaced.

    Args:
        source: A `Path`, or a text of YAML.
        overrides: Fields to replace, `"optimizer.learning_rate=1e-4"`.
        name: What messages call a text.

    Raises:
        RunFileError: No plain YAML of fields, or no such field.
    """
    if isinstance(source, Path):
        document, folder = read_file(source), source.parent
    else:
        document, folder = read_text(source, name or "text"), Path()
    for override in overrides:
        document = _override(document, override)
    if not isinstance(document.value, dict):
        raise RunFileError(
            [document.problem((), "expected fields, got none. Write `name: value`.")]
        )
    return document._replace(value=_resolve(document.value, folder))


def as_typed(root: type[Root], document: Document) -> Root:
    """A document as an object.

    Args:
        root: Of this class.
        document: Its fields.

    Raises:
        RunFileError: Every problem with file, line, field and remedy.
    """
    value = document.value
    try:
        return root.model_validate_json(json.dumps(value))
    except pydantic.ValidationError as error:
        found = unknown_fields(list(problems(error)), value, root)
        lines = [document.problem(place, text) for place, text in found]
        raise RunFileError(lines) from None


def replaced(value: Any, place: tuple[str | int, ...], new: Any) -> Any:
    """A copy with one field replaced.

    Args:
        value: Dictionaries and lists.
        place: Where.
        new: By what.

    Raises:
        KeyError: No such place; likewise IndexError, TypeError.
    """
    if not place:
        return new
    first, rest = place[0], place[1:]
    if isinstance(value, list):
        out = list(value)
        out[first] = replaced(out[first], rest, new)
        return out
    if not isinstance(value, dict):
        raise TypeError
    inner = value.get(first) if not rest else value[first]
    return {**value, first: replaced(inner, rest, new)}


def place_of(field: str) -> tuple[str | int, ...]:
    """Where a dotted name points to."""
    return tuple(int(p) if p.isdigit() else p for p in field.split("."))


def _resolve(value: Any, folder: Path) -> Any:
    """Paths of files that are named relative to the run file."""
    if isinstance(value, Mapping):
        return {
            # Absolute: a run is resumed and repeated from other folders.
            k: os.path.abspath(folder / v)
            if k in _PATHS and isinstance(v, str)
            else _resolve(v, folder)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [_resolve(v, folder) for v in value]
    return value


def _override(document: Document, text: str) -> Document:
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise RunFileError([f"{text}: expected field=value, such as seed=1."])
    parsed = read_text(value or "null", f"{field}=").value
    try:
        value = replaced(document.value, place_of(field), parsed)
    except (KeyError, IndexError, TypeError):
        raise RunFileError(
            [
                f"{text}: expected a field of {document.name}, found none of this name. "
                "Print them with `trainax-pk show`."
            ]
        ) from None
    return document._replace(value=value)
