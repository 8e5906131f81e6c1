"""Notebooks run from top to bottom at a small size, and are committed executed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def _cells(path, kind):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def test_notebooks_are_numbered():
    numbers = [int(path.name[:2]) for path in NOTEBOOKS]
    assert numbers == list(range(1, 11))


def test_a_new_task_needs_few_lines_beside_the_trainer():
    path = ROOT / "notebooks" / "10_generic_trainer.ipynb"
    sources = ["".join(cell["source"]) for cell in _cells(path, "code")]
    (adapter,) = [text for text in sources if "def patches(" in text]
    for part in ("class Velocity(", "def generate(", "class Generation("):
        assert part in adapter
    assert len(adapter.splitlines()) < 100
    assert not any("(tx.trainer" in text for text in sources)  # no subclass


@pytest.mark.slow
@notebooks
def test_notebook_runs(path, tmp_path):
    code = "\n\n".join("".join(cell["source"]) for cell in _cells(path, "code"))
    script = tmp_path / f"{path.stem}.py"
    # As in conftest.py: cycles are searched for less often.
    script.write_text(f"import gc; gc.set_threshold(50_000, 10, 10)\n{code}", "utf-8")
    # A process of its own: a notebook sets devices and precision for itself.
    flags = os.environ["XLA_FLAGS"].split()
    environment = {
        **os.environ,
        "TRAINAX_PK_SMALL": "1",
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(x for x in flags if "device_count" not in x),
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@notebooks
def test_notebook_is_committed_with_its_results(path):
    outputs = [cell["outputs"] for cell in _cells(path, "code")]
    counts = [cell["execution_count"] for cell in _cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom"
    types = [output["output_type"] for cell in outputs for output in cell]
    assert "error" not in types
    assert any("image/png" in o.get("data", {}) for cell in outputs for o in cell)
    assert path.stat().st_size < 1_000_000


@notebooks
def test_notebook_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    for word in ("/tmp/", "/home/", "/root/", "site-packages"):
        assert word not in text
