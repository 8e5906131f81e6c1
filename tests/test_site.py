"""The site builds without a warning and without network, and holds every public name."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.test_architecture import NAMESPACES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SPACES = ["trainax_pk", *(f"trainax_pk.{name}" for name in NAMESPACES)]


class _Page(HTMLParser):
    """Anchors, what a browser would fetch by itself, and the text after each anchor."""

    def __init__(self, path):
        super().__init__()
        self.after = {}
        self.fetched = []
        self._anchor = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"):
            self._anchor = attrs["id"]
            self.after[self._anchor] = ""
        self.fetched += [attrs["src"]] if attrs.get("src") else []
        if tag == "link" and attrs.get("rel") == "stylesheet":
            self.fetched.append(attrs["href"])

    def handle_data(self, data):
        if self._anchor:
            self.after[self._anchor] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        folder,
    ]
    # What asks for the network anyway finds nobody there.
    nobody = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for ruff
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **nobody, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site).as_posix(): _Page(p) for p in site.rglob("*.html")}


@pytest.mark.parametrize("space", SPACES)
def test_every_public_name_is_in_the_reference(pages, space):
    page = pages[f"reference/{space}.html"]
    module = importlib.import_module(space)
    assert space in page.after
    for name in module.__all__:
        if f"{space}.{name}" in SPACES:
            continue
        text = page.after.get(f"{space}.{name}")
        assert text is not None, f"{space}.{name} is not on the site"
        thing = getattr(module, name)
        if "documented there" in text:  # under another public name, which is linked
            continue
        if not getattr(thing, "__module__", "").startswith("trainax_pk"):
            assert len(text.split()) > 4, f"{space}.{name} is bare: {text!r}"
            continue
        summary = _letters(inspect.getdoc(thing).split("\n")[0])
        assert summary in _letters(text), f"{space}.{name} is without its docstring"


def _letters(text):
    return re.sub(r"\W", "", text)


def test_examples_are_code(pages):
    """Not text: prompts are in a block that is highlighted."""
    bare = [name for name, page in pages.items() if "Example:" in str(page.after)]
    assert not bare
    assert ">>> " in str(pages["reference/trainax_pk.solver.html"].after)


def test_signatures_are_those_of_the_classes(pages):
    """griffe does not run what it reads: docs/site_build/reading.py tells it of fields."""
    wrong = []
    for space in SPACES:
        shown = pages[f"reference/{space}.html"].after
        for name in importlib.import_module(space).__all__:
            cls = getattr(importlib.import_module(space), name)
            if not inspect.isclass(cls) or not cls.__module__.startswith("trainax_pk"):
                continue
            if issubclass(cls, Exception) or getattr(cls, "_is_protocol", False):
                continue
            text = re.sub(r"\s", "", shown[f"{space}.{name}"])
            if "documentedthere" in text:
                continue
            for parameter in inspect.signature(cls).parameters.values():
                if not re.search(rf"[(,*]{parameter.name}[:=,)]", text):
                    wrong.append(f"{space}.{name}({parameter.name})")
    assert not wrong


def test_every_document_is_on_the_site(pages):
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]:
        assert f"{page.parent.name}/{page.stem}.html" in pages
    for report in (ROOT / "benchmarks" / "results").glob("*_*.md"):
        assert f"benchmarks/results/{report.stem}.html" in pages


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for name, page in pages.items():
        assert page.fetched
        for address in page.fetched:
            assert not re.match(r"(\w+:)?//", address), f"{name} fetches {address}"
            if name == "404.html":  # served from anywhere
                continue
            local = site / Path(name).parent / address.split("?")[0].split("#")[0]
            assert local.exists(), f"{name} shows {address}, which is not there"


def test_formulas_of_notebooks_are_mathml(site):
    for path in (site / "notebooks").glob("*.html"):
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", path.read_text(), flags=re.S)
        assert "$" not in text, f"{path.name} shows LaTeX as it was typed"
        assert "<p><math" not in text and "\n<math" not in text.replace(
            '\n<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"', ""
        )
