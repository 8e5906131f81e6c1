"""Reads YAML as data alone, and remembers on which line every value stands."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_MOST_BYTES = 2**20
_MOST_DEPTH = 30
_MOST_DIGITS = 18
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}

Place = tuple[str | int, ...]


class RunFileError(ValueError):
    """A run file that cannot be used: where, what, and what to do.

    Attributes:
        problems: One line each, `file:line: field: problem`.

    Example:
        >>> import trainax_pk.experiment as experiment
        >>> try:
        ...     experiment.read_run("seed: 1\\nmodel: {kind: mpl}", name="run.yaml")
        ... except experiment.RunFileError as error:
        ...     print(error.problems[1])
        run.yaml:2: model.kind: expected one of ... got 'mpl'. Did you mean 'mlp'?
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[Any, ...]:
        # From the lines, not from the message that they are joined to.
        return type(self), (self.problems,), self.__dict__


class Document(NamedTuple):
    """What a file holds.

    Attributes:
        value: Dictionaries, lists, strings, numbers, true, false, null.
        lines: By place in the value, the line it stands on, counted from 1.
        name: Of the file.
    """

    value: Any
    lines: dict[Place, int]
    name: str

    def problem(self, place: Place, text: str) -> str:
        """A line that says what is wrong, where."""
        known = place
        while known and known not in self.lines:
            known = known[:-1]
        # A key may hold line breaks; a problem is one line.
        shown = (str(part) for part in place)
        field = ".".join(p if p.isprintable() else repr(p) for p in shown)
        where = f"{self.name}:{self.lines.get(known, 1)}: "
        return f"{where}{field}: {text}" if field else f"{where}{text}"


def read_file(path: str | Path) -> Document:
    """A YAML file as data.

    Args:
        path: Of the file.

    Returns:
        Its value and lines.

    Raises:
        RunFileError: It is not there, not text, too large, or no plain YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise RunFileError([f"{path}:1: expected a file, found none. Check the path."])
    if path.stat().st_size > _MOST_BYTES:
        raise RunFileError(
            [f"{path}:1: expected at most {_MOST_BYTES} bytes. Keep data out of it."]
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        message = (
            f"{path}:1: expected text in UTF-8, got other bytes. Save it as UTF-8."
        )
        raise RunFileError([message]) from None
    return read_text(text, str(path))


def read_text(text: str, name: str = "text") -> Document:
    """YAML as data: no tags, no anchors, no code, JSON's types alone.

    Numbers are those of YAML 1.2: `1e-3` is one, `yes` and `1:30` are text.

    Args:
        text: One document.
        name: What messages call it.

    Returns:
        Its value and lines.

    Raises:
        RunFileError: It is no such document.
    """
    if len(text) > _MOST_BYTES:
        raise RunFileError(
            [f"{name}:1: expected at most {_MOST_BYTES} characters. Keep data out."]
        )
    reader = _Reader(name)
    try:
        # Events alone: no node is resolved and no object made by the library.
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        value = reader.document(events)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        problem = f"expected YAML, got a mistake: {error.problem}. Mend this line."
        raise RunFileError([f"{name}:{line}: {problem}"]) from None
    except yaml.YAMLError as error:
        message = f"{name}:1: expected YAML: {error}. Remove such characters."
        raise RunFileError([" ".join(message.split())]) from None
    return Document(value, reader.lines, name)


class _Reader:
    """Builds values from events, refusing whatever is more than data."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Place, int] = {}

    def document(self, events: Any) -> Any:
        """The only document."""
        value, seen = None, False
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if seen:
                    self._fail(event, "expected one document, got another. Remove it.")
                if event.tags or event.version:
                    self._fail(event, "expected no directive. Remove it.")
                value, seen = self._value(next(events), events, ()), True
        if not seen:
            raise RunFileError(
                [f"{self.name}:1: expected a run, got an empty file. Fill it."]
            )
        return value

    def _value(self, event: Any, events: Any, place: Place) -> Any:
        self.lines[place] = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            self._fail(event, f"expected no alias, got *{event.anchor}. Write it out.")
        if event.anchor is not None:
            self._fail(event, f"expected no anchor, got &{event.anchor}. Write it out.")
        if event.tag is not None:
            self._fail(
                event,
                f"expected no tag, got {event.tag}. Tags build objects: remove it.",
            )
        if len(place) > _MOST_DEPTH:
            self._fail(event, f"expected at most {_MOST_DEPTH} levels. Flatten it.")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(events, place)
        return self._mapping(events, place)

    def _list(self, events: Any, place: Place) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            found.append(self._value(event, events, (*place, len(found))))
        return found

    def _mapping(self, events: Any, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag or event.anchor:
                self._fail(event, "expected the name of a field. Write `name: value`.")
            key = event.value
            if key in found:
                self._fail(
                    event, f"expected every field once, got {key!r} again. Remove one."
                )
            found[key] = self._value(next(events), events, (*place, key))
            self.lines[(*place, key)] = event.start_mark.line + 1
        return found

    def _scalar(self, event: Any) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _NOT_FINITE.fullmatch(text):
            self._fail(event, f"expected a finite number, got {text}. Write one.")
        if _INT.fullmatch(text):
            if len(text.lstrip("+-")) > _MOST_DIGITS:
                self._fail(
                    event,
                    f"expected at most {_MOST_DIGITS} digits. Write a smaller number.",
                )
            return int(text)
        if _FLOAT.fullmatch(text):
            number = float(text)
            if not math.isfinite(number):
                self._fail(
                    event,
                    f"expected a number of double precision, got {text}. Write one.",
                )
            return number
        return text

    def _fail(self, event: Any, text: str) -> None:
        raise RunFileError([f"{self.name}:{event.start_mark.line + 1}: {text}"])
