"""What README and docs show is run; what they name exists."""

import re
from pathlib import Path

import pytest

import trainax_pk
import trainax_pk.compat

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def _blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        (text[: m.start()].count("\n") + 2, m.group(1))
        for m in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.slow
@pages
def test_code_runs(page):
    """The blocks of a page, in order, as one program."""
    namespace = {"__name__": page.stem}
    for line, code in _blocks(page):
        # Padded so that a traceback shows the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pages
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pages
def test_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r"\btx\.([A-Za-z_][\w.]*\w)", text))):
        assert any(_has(module, name) for module in (trainax_pk, trainax_pk.compat)), (
            f"{page.name} names tx.{name}"
        )


@pages
def test_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:trainax_pk|tests|benchmarks)/[\w./]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_feature_table_names_what_the_namespaces_hold():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `tx\.(\w+)`.*? \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) >= 8
    for namespace, row in rows:
        home = getattr(trainax_pk, namespace)
        for name in re.findall(r"`([A-Z]\w+)[`(]", row):
            assert hasattr(home, name), f"README names {namespace}.{name}"


def test_every_configuration_and_adjoint_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for namespace in (trainax_pk.configuration, trainax_pk.adjoint):
        for name in namespace.__all__:
            public = name[0].isupper() and not name.startswith("Abstract")
            assert not public or name == "Aux" or name in text, name


def _has(module, name):
    for piece in name.split("."):
        if not hasattr(module, piece):
            return False
        module = getattr(module, piece)
    return True
