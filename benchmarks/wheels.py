"""Does the built wheel install into fresh environments, and does an example run there?

python -m benchmarks.wheels PYTHON [PYTHON ...]

Takes minutes: every environment installs all dependencies.
"""

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks._harness import report, table

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["training.num_steps=200"]
HEADER = ("Python", "jax", "install, s", "import and `show`, s", "run", "reproduction")
NOTE = """One wheel, built from the working tree, into an empty virtual environment of each
Python, with the `models` extra and nothing else; then, in another folder and without the
working tree on the path, `trainax-pk show`, `run` and `reproduce` of
`examples/advection.yaml` (200 updates)."""


def main() -> None:
    """Builds, installs, runs, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="+", help="interpreters")
    parser.add_argument("--no-report", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(args.pythons[0], folder)
        found = [
            check(python, wheel, folder / str(i))
            for i, python in enumerate(args.pythons)
        ]
    rows = [row for row, _ in found]
    worked = all(good for _, good in found)
    body = f"{NOTE}\n\nThe wheel: `{wheel.name}`.\n\n{table(HEADER, rows)}"
    verdict = "- Installs and runs in each: " + ("met." if worked else "**missed**.")
    if args.no_report:
        print(body, verdict, sep="\n\n")
    else:
        report("wheels", "Does the wheel install and run?", body, verdict)
    raise SystemExit(not worked)


def build(python: str, folder: Path) -> Path:
    """The wheel."""
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT)]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True)
    return next(folder.glob("*.whl"))


def check(python: str, wheel: Path, folder: Path) -> tuple[list[str], bool]:
    """A row of the table, and whether all went well."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    own = folder / "bin" / "python"
    began = time.perf_counter()
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"{wheel}[models]"], check=True)
    seconds = time.perf_counter() - began
    probe = "import platform, jax; print(platform.python_version(), jax.__version__)"
    versions = subprocess.run(
        [own, "-c", probe], capture_output=True, text=True, check=True
    ).stdout.split()
    example = folder / "advection.yaml"
    example.write_text((ROOT / "examples" / "advection.yaml").read_text())
    began = time.perf_counter()
    call(folder, "show", "advection.yaml")
    start = time.perf_counter() - began
    run = call(folder, "run", "advection.yaml", *FIELDS)
    again = call(folder, "reproduce", "runs/advection")
    results = [(r.stdout or r.stderr).strip().splitlines() for r in (run, again)]
    line = next((x for x in results[0] if "one_step" in x), results[0][-1])
    row = [*versions, f"{seconds:.0f}", f"{start:.1f}", line, results[1][-1]]
    return row, run.returncode == again.returncode == 0


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The installed command, with nothing of this process's paths."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [folder / "bin" / "trainax-pk", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
