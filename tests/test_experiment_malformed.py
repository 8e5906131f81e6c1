"""A hundred run files that are none: refused at once, with file, line, field and remedy."""

import functools
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from trainax_pk import experiment

ROOT = Path(__file__).resolve().parent.parent
MARKER = "RAN"
REMEDY = re.compile(
    r"(Add|Change|Choose|Did you mean|Fill|Flatten|Give|Keep|Lower|Mend|Raise|Remove|"
    r"Shorten|Sort|Swap|Write|remove) ?[^.]*[.?]"
)
# An example's file, and each of its fields, damaged in every way that fits.
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
WRONG = {
    "type": [[], {}, "text", True],
    "size": [-1, 1e300, 10**17],
    "name": ["no_such_kind"],
}
TAGS = [
    f"!!python/object/apply:os.system ['touch {MARKER}']",
    f"!!python/object/apply:pathlib.Path.touch ['{MARKER}']",
    f"!!python/object/new:subprocess.Popen [['touch', '{MARKER}']]",
    "!!python/name:os.system ''",
    "!!python/module:antigravity ''",
    "!!python/tuple [1, 2]",
    "!!set {a, b}",
    "!!binary aGVsbG8=",
    "!!timestamp 2026-01-01",
    "!include other.yaml",
    "!ENV HOME",
]
STRUCTURE = {
    "cycle": "more: &m [*m]\n",
    "cycle of fields": "more: &m {again: *m}\n",
    "aliases of aliases": "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "merge": "more: {<<: {seed: 1}}\n",
    "levels": "more: " + "[" * 500 + "]" * 500 + "\n",
    "levels of fields": "more: " + "{a: " * 500 + "1" + "}" * 500 + "\n",
    "huge": "more: " + "9" * 5000 + "\n",
    "huge exponent": "more: 1e99999\n",
    "infinity": "more: .inf\n",
    "no number": "more: .nan\n",
    "long": "more: " + "x" * 2**20 + "\n",
    "open": "more: [1, {a: 2\n",
    "quote": "more: 'text\n",
    "tab": "\tmore: 1\n",
    "control": "more: \x01\n",
    "two documents": "---\nseed: 2\n",
    "twice": "seed: 1\nseed: 2\n",
    "complex name": "? {a: 1}\n: 2\n",
    "no field": "- 1\n",
}


def _fields(value, place=()):
    """Places of all fields that hold no others."""
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _fields(inner, (*place, name))
        elif not isinstance(inner, list):
            yield (*place, name)


def _replaced(value, place, new):
    if not place:
        return new
    return {**value, place[0]: _replaced(value[place[0]], place[1:], new)}


def _without(value, place):
    if len(place) == 1:
        return {k: v for k, v in value.items() if k != place[0]}
    return {**value, place[0]: _without(value[place[0]], place[1:])}


def _renamed(value, place):
    fields = _at(value, place[:-1])
    new = {k + "x" if k == place[-1] else k: v for k, v in fields.items()}
    return _replaced(value, place[:-1], new)


def _at(value, place):
    for part in place:
        value = value[part]
    return value


def _generated():
    """Name, text, and whether a field has to be named."""
    for path in EXAMPLES:
        text = path.read_text()
        # As data: `1e-3` is a number there.
        described = experiment.read_run(path).to_data()
        plain = {k: v for k, v in described.items() if v is not None}
        dump = lambda v: yaml.safe_dump(v, sort_keys=False)  # noqa: E731
        for place in _fields(plain):
            name = f"{path.stem}: {'.'.join(place)}"
            known = place[-1] if place[-1] == "kind" else place[-1] + "x"
            yield f"{name} misspelt", dump(_renamed(plain, place)), known
            for kind, values in WRONG.items():
                for wrong in values:
                    new = dump(_replaced(plain, place, wrong))
                    yield f"{name}, wrong {kind} {wrong!r}", new, place[-1]
        for part in ("data", "model", "configuration", "optimizer", "training"):
            yield f"{path.stem} without {part}", dump(_without(plain, (part,))), part
        for tag in TAGS:
            yield f"{path.stem} {tag}", f"{text}more: {tag}\n", None
        for name, lines in STRUCTURE.items():
            yield f"{path.stem} {name}", text + lines, None


def _is_a_run(text):
    """Some damage leaves a run: a name may be any text, and 1e300 is a number."""
    try:
        return experiment.read_run(text) is not None
    except experiment.RunFileError:
        return False


@functools.cache
def _chosen():
    """Of all that are none, every n-th: a hundred and some, of every kind."""
    found = list(_generated())
    kinds = [f for f in found if f[2] is None][: len(TAGS) + len(STRUCTURE)]
    fields = [f for f in found if f[2] is not None]
    step = max(1, len(fields) // 110)
    damaged = (
        f for f in itertools.islice(fields, 0, None, step) if not _is_a_run(f[1])
    )
    return [*kinds, *damaged]


def test_a_hundred_malformed_files_are_refused_with_line_field_and_remedy(tmp_path):
    cases = _chosen()
    assert len(cases) >= 100
    assert len({text for _, text, _ in cases}) == len(cases)
    file = tmp_path / "run.yaml"
    for name, text, field in cases:
        file.write_text(text)
        began = time.process_time()
        with pytest.raises(experiment.RunFileError) as caught:
            experiment.read_run(file)
        assert time.process_time() - began < 1.0, name
        for problem in caught.value.problems:
            assert problem.startswith(f"{file}:"), (name, problem)
            number, _, rest = problem.removeprefix(f"{file}:").partition(": ")
            assert 1 <= int(number) <= text.count("\n") + 2, (name, problem)
            # What was expected, what was found, what to do.
            assert re.search(r"expected|unknown field|required field", rest), problem
            assert REMEDY.search(rest), (name, problem)
        # As its place, or in the text where a field and another do not fit.
        said = [p.removeprefix(f"{file}:") for p in caught.value.problems]
        assert field is None or any(field in text for text in said), (name, said)


def test_none_of_them_runs_anything_or_allocates(tmp_path):
    """All in a fresh process, which would have to start a backend to allocate."""
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([text for _, text, _ in _chosen()]))
    script = f"""
import json, sys
from pathlib import Path
import trainax_pk.experiment as experiment
before = set(sys.modules)
refused = 0
for text in json.loads(Path({str(file)!r}).read_text()):
    try:
        experiment.read_run(text)
    except experiment.RunFileError:
        refused += 1
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was started"
new = {{m for m in set(sys.modules) - before if m.split(".")[0] in ("antigravity", "this")}}
assert not new, new
print(refused)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 100
    assert not list(tmp_path.rglob(MARKER))
