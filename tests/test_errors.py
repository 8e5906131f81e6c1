"""Errors of this package: they pass between processes as what they are."""

import importlib
import inspect
import pickle
import pkgutil

import pytest

import trainax_pk

# What their constructors take beside the message.
VALUES = {
    "step": 100,
    "problems": {20: "a file is missing"},
    "fields": ["batch_size", "optimizer.rate"],
    "parts": [3, 5],
}


def errors():
    """All exception classes of the package, by name."""
    found = {}
    for module in pkgutil.walk_packages(trainax_pk.__path__, "trainax_pk."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            own = inspect.isclass(value) and value.__module__ == module.name
            if own and issubclass(value, BaseException):
                found[f"{module.name}.{name}"] = value
    return found


ERRORS = errors()


def build(cls):
    if "__init__" not in vars(cls):
        return cls("what is wrong")
    _, first, *others = inspect.signature(cls.__init__).parameters.values()
    if first.name == "problems":
        return cls(["run.yaml:2: what is wrong", "run.yaml:5: and more"])
    assert first.name == "message"
    positional = [VALUES[p.name] for p in others if p.kind is not p.KEYWORD_ONLY]
    named = {p.name: VALUES[p.name] for p in others if p.kind is p.KEYWORD_ONLY}
    return cls("what is wrong", *positional, **named)


def test_the_walk_finds_them():
    names = {name.rsplit(".", 1)[-1] for name in ERRORS}
    known = {"SaveFailed", "RunChanged", "CheckpointDamaged", "CacheDamaged"}
    assert known | {"ProcessLost", "NotFinite"} <= names


@pytest.mark.parametrize("name", ERRORS)
def test_they_come_back_from_another_process(name):
    error = build(ERRORS[name])
    error.add_note("in trial 3")
    if hasattr(error, "model"):
        error.model = {"weight": 1.5}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is type(error) and str(again) == str(error)
        assert again.args == error.args and vars(again) == vars(error)
    assert vars(again)["__notes__"] == ["in trial 3"]
