"""Typed parts of a run file, by family and kind."""

import abc
import difflib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, get_args

import pydantic
from pydantic_core import PydanticCustomError, core_schema

from trainax_pk.experiment._yaml import Place

# A family's name to its kinds.
_KINDS: dict[str, dict[str, type["AbstractSpec"]]] = {}
_NESTED = "nested"
FAMILY = "family"
_Base = pydantic.BaseModel


class AbstractSpec(pydantic.BaseModel, abc.ABC):
    """A part of a run file: a `kind` and its fields, checked, frozen, nothing else.

    To add a kind: subclass, give it `kind: Literal["its name"] = "its name"` and fields
    with types and limits, implement `build`, and decorate it with
    `register("its family")`. Fields are numbers, text, true, false, tuples of these, or
    specs of a family (`Annotated[AbstractSpec, Family("adjoint")]`). Every field has to
    change what `build` returns.

    Example:
        See `register`.
    """

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False
    )
    family: ClassVar[str] = ""

    @abc.abstractmethod
    def build(self, *arguments: Any) -> Any:
        """What the spec stands for; arguments are those of its family."""

    def to_data(self) -> dict[str, Any]:
        """As a run file would have it, every field written out."""
        return self.model_dump(mode="json")


class Family:
    """Type of a field that holds a spec of any kind of a family.

    Example:
        >>> from typing import Annotated
        >>> from trainax_pk.experiment import AbstractSpec, Family
        >>> schedule_field = Annotated[AbstractSpec, Family("schedule")]
    """

    def __init__(self, name: str, *, or_positive: bool = False) -> None:
        """Names the family; its kinds may be registered later.

        Args:
            name: Of the family.
            or_positive: Whether a positive number will do, too.
        """
        self.name = name
        self.or_positive = or_positive

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Dispatches by kind when a value is checked, so that kinds may be added."""
        del source, handler
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda x: x.model_dump(mode="json") if isinstance(x, _Base) else x
            ),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        """A placeholder, which `json_schema` makes a reference."""
        del schema, handler
        if not self.or_positive:
            return {FAMILY: self.name}
        number = {"type": "number", "exclusiveMinimum": 0}
        return {"anyOf": [number, {FAMILY: self.name}]}

    def validate(self, value: Any) -> Any:
        """The spec that a value describes, or the number."""
        kinds = _KINDS[self.name]
        if isinstance(value, tuple(kinds.values())):
            return value
        if self.or_positive and type(value) in (int, float):
            if not 0 < value < math.inf:
                raise _custom(
                    (), f"expected a number above 0, got {value!r}. Raise it."
                )
            return float(value)
        if isinstance(value, str) and value in kinds:
            value = {"kind": value}
        if not isinstance(value, dict):
            number = "a number above 0, or " if self.or_positive else ""
            note = " Text in quotes is no number." if number else ""
            raise _custom(
                (),
                f"expected {number}`kind:` and its fields, got {value!r}. Kinds: "
                f"{', '.join(kinds)}.{note} Choose one of these.",
            )
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            got = "nothing" if kind is None else repr(kind)
            close = nearest(kind, kinds) or " Choose one of them."
            remedy = " Add `kind:`." if kind is None else close
            raise _custom(
                ("kind",), f"expected one of {', '.join(kinds)}, got {got}.{remedy}"
            )
        try:
            return kinds[kind].model_validate_json(json.dumps(value))
        except pydantic.ValidationError as error:
            raise _custom((), "", list(problems(error))) from None


def register(family: str) -> Callable[[type[AbstractSpec]], type[AbstractSpec]]:
    """Makes a kind known to run files.

    Args:
        family: "optimizer", "schedule", "model", "configuration", "adjoint", "data",
            "callback", or a new one.

    Returns:
        A decorator of subclasses of `AbstractSpec`.

    Raises:
        ValueError: When it is applied: the class has no `kind`, or another class has it.

    Example:
        >>> from typing import Literal
        >>> import equinox as eqx
        >>> from trainax_pk.experiment import AbstractSpec, register
        >>> @register("model")
        ... class Scale(AbstractSpec):
        ...     kind: Literal["one_linear_layer"] = "one_linear_layer"
        ...     size: int
        ...     def build(self, shape, *, key):
        ...         return eqx.nn.Linear(self.size, self.size, key=key)
    """

    def decorate(cls: type[AbstractSpec]) -> type[AbstractSpec]:
        field = cls.model_fields.get("kind")
        names = get_args(field.annotation) if field is not None else ()
        if len(names) != 1 or field.default != names[0]:
            raise ValueError(
                f"Expected {cls.__name__} to have `kind: Literal['name'] = 'name'`. Add "
                "it: it is how files name the class."
            )
        kinds = _KINDS.setdefault(family, {})
        if kinds.get(names[0], cls).__qualname__ != cls.__qualname__:
            raise ValueError(
                f"Expected a new kind of {family}, got {names[0]!r}, which "
                f"{kinds[names[0]].__name__} has. Choose another name."
            )
        kinds[names[0]] = cls
        cls.family = family
        return cls

    return decorate


def kinds_of(family: str) -> dict[str, type[AbstractSpec]]:
    """The registered kinds of a family, by name.

    Args:
        family: As for `register`.

    Returns:
        A copy.

    Raises:
        KeyError: No such family.

    Example:
        >>> from trainax_pk.experiment import kinds_of
        >>> "adam" in kinds_of("optimizer")
        True
    """
    return dict(_KINDS[family])


def families() -> dict[str, dict[str, type[AbstractSpec]]]:
    """All families, with their kinds."""
    return {name: dict(kinds) for name, kinds in _KINDS.items()}


def problems(error: pydantic.ValidationError) -> Iterator[tuple[Place, str]]:
    """Place and text of each problem, those of nested specs included."""
    for one in error.errors(include_url=False):
        place = one["loc"]
        context = one.get("ctx", {})
        if one["type"] == _NESTED:
            for inner, text in context["problems"]:
                yield (*place, *inner), text
        else:
            yield place, _text(one, context)


def nearest(name: Any, known: Any) -> str:
    """Did you mean …? or nothing."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


# By the beginning of pydantic's type of error.
_REMEDIES = {
    "greater": "Raise it.",
    "less": "Lower it.",
    "int": "Write a whole number.",
    "float": "Write a number.",
    "bool": "Write true or false.",
    "string": "Write text, in quotes if it looks like a number.",
    "too_short": "Add what is missing.",
    "too_long": "Remove what is too much.",
    "tuple": "Write a list, such as [1, 2].",
    "list": "Write a list, such as [1, 2].",
    "dict": "Write fields, such as {name: value}.",
    "model": "Write fields, such as {name: value}.",
}


def _text(one: dict[str, Any], context: dict[str, Any]) -> str:
    kind, got = one["type"], one.get("input")
    if kind == "extra_forbidden":
        return "unknown field. Remove it."
    if kind == "missing":
        return "required field, missing. Add it."
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"expected {context['expected']}, got {got!r}. Choose one of them."
    message = one["msg"][0].lower() + one["msg"][1:]
    note = ""
    if isinstance(got, str) and kind.startswith(("int", "float")):
        note = " Text in quotes is no number."
    remedies = (text for start, text in _REMEDIES.items() if kind.startswith(start))
    remedy = next(remedies, "Change it.")
    expected = message.replace("input should be", "expected")
    return f"{expected}, got {got!r}.{note} {remedy}"


def _custom(
    place: Place, text: str, nested: list[tuple[Place, str]] | None = None
) -> PydanticCustomError:
    found = [(place, text)] if nested is None else nested
    return PydanticCustomError(_NESTED, "nested", {"problems": found})


def unknown_fields(
    found: list[tuple[Place, str]], data: Any, root: type[pydantic.BaseModel]
) -> list[tuple[Place, str]]:
    """Adds the nearest name to problems with unknown fields."""
    named = []
    for place, text in found:
        if text.startswith("unknown field"):
            names = _fields_at(place[:-1], data, root)
            text = f"unknown field.{nearest(place[-1], names) or ' Remove it.'}"
            text += f" Fields here: {', '.join(names)}."
        named.append((place, text))
    return named


def _fields_at(place: Place, data: Any, root: type[pydantic.BaseModel]) -> list[str]:
    cls: Any = root
    for part in place:
        data = data[part]
        # A kind is unique among all that has these fields' names.
        kind = data.get("kind") if isinstance(data, dict) else None
        named = [
            k[kind] for k in _KINDS.values() if isinstance(kind, str) and kind in k
        ]
        known = getattr(cls, "model_fields", {}).get(str(part))
        cls = named[0] if named else _inner_class(getattr(known, "annotation", None))
    return list(getattr(cls, "model_fields", {}))


def _inner_class(annotation: Any) -> Any:
    """The class of an optional part."""
    classes = [c for c in get_args(annotation) if hasattr(c, "model_fields")]
    return classes[0] if classes else annotation


Unit = Literal["steps", "epochs"]
