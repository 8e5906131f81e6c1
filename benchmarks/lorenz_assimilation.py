"""What does a learned solver reach on Lorenz windows, beside classical methods?

python -m benchmarks.lorenz_assimilation [--cases l63_all …] [--only classical …]

Each result is kept in `results/lorenz_assimilation_<hardware>.json` as soon as it is
there; what is kept is not computed again. `--seconds` starts nothing new after so many;
`--report` writes the report from what there is.
"""

import argparse
import json
import time
from typing import Any

from benchmarks import _lorenz_report
from benchmarks._harness import RESULTS, hardware
from benchmarks._lorenz_classical import METHODS, run_classical
from benchmarks._lorenz_continued import continued, run_bound
from benchmarks._lorenz_data import CASES
from benchmarks._lorenz_learned import ADJOINTS, SETTINGS, train
from benchmarks._lorenz_speed import compare_speed

SEEDS = (0, 1, 2)
# Shares of a case's updates, each with a schedule of its own.
TREND = (0.1, 0.3)
PARTS = ("classical", "learned", "trend", "speed")


def main() -> None:
    """Runs what is missing, or writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--adjoints", nargs="*", choices=[*ADJOINTS], default=[*ADJOINTS]
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        _lorenz_report.write(_load())
        return
    began = time.monotonic()
    for name, run in _tasks(args).items():
        if name in _load() or time.monotonic() - began > args.seconds:
            continue
        row = run()
        # Read again: another process may have added rows in the meantime.
        kept = _load() | {name: row}
        _path().write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(name, row, flush=True)


def _tasks(args: argparse.Namespace) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for case in args.cases:
        if "classical" in args.only:
            for method in METHODS:
                tasks[f"{case}/{method}"] = lambda c=case, m=method: run_classical(c, m)
            tasks[f"{case}/bound"] = lambda c=case: run_bound(c)
        updates = SETTINGS[case].updates
        if "learned" in args.only:
            for adjoint in args.adjoints:
                for seed in args.seeds:
                    tasks[f"{case}/4DVarNet, {adjoint}/{seed}"] = (
                        lambda c=case, a=adjoint, s=seed: _learned(c, a, s)
                    )
        if "trend" in args.only:
            for share in TREND:
                fewer = round(share * updates)
                tasks[f"{case}/trend/{fewer}"] = lambda c=case, s=share: train(
                    c, "direct", 0, s
                )[0]
        if "speed" in args.only:
            tasks[f"{case}/speed"] = lambda c=case: compare_speed(c)
    return tasks


def _learned(case: str, adjoint: str, seed: int) -> dict[str, Any]:
    row, states = train(case, adjoint, seed)
    return row | continued(case, states) if adjoint == "direct" else row


def _path() -> Any:
    return RESULTS / f"lorenz_assimilation_{hardware()}.json"


def _load() -> dict[str, Any]:
    return json.loads(_path().read_text()) if _path().exists() else {}


if __name__ == "__main__":
    main()
