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
from benchmarks._lorenz_learned import METHODS as LEARNED
from benchmarks._lorenz_learned import run_unlearned, train
from benchmarks._lorenz_speed import compare_speed
from benchmarks._lorenz_staged import CASE as STAGED_CASE
from benchmarks._lorenz_staged import METHODS as STAGED
from benchmarks._lorenz_staged import train_staged

SEEDS = (0, 1, 2)
# Shares of a case's updates, each with a schedule of its own.
TREND = (0.1, 0.3)
# Of directions, as names of the learned methods begin.
KINDS = ("", "Gauss-Newton, ")
PARTS = ("classical", "learned", "trend", "speed")


def main() -> None:
    """Runs what is missing, or writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--learned", nargs="*", choices=[*LEARNED, *STAGED])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if STAGED_CASE not in args.cases and set(args.learned or ()) & set(STAGED):
        parser.error(f"Of {list(STAGED)} there is {STAGED_CASE} alone.")
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
        if "learned" in args.only:
            tasks[f"{case}/Gauss-Newton steps, untrained"] = lambda c=case: (
                run_unlearned(c)
            )
            known = [*LEARNED, *(STAGED if case == STAGED_CASE else ())]
            for seed in args.seeds:
                for method in (m for m in known if m in (args.learned or known)):
                    tasks[f"{case}/4DVarNet, {method}/{seed}"] = (
                        lambda c=case, m=method, s=seed: _learned(c, m, s)
                    )
        for kind in KINDS:
            updates = LEARNED[f"{kind}direct"][0][case].updates
            for share in TREND if "trend" in args.only else ():
                fewer = round(share * updates)
                tasks[f"{case}/{kind}trend/{fewer}"] = lambda c=case, k=kind, s=share: (
                    train(c, f"{k}direct", 0, s)[0]
                )
            if "speed" in args.only:
                tasks[f"{case}/{kind}speed"] = lambda c=case, k=kind: compare_speed(
                    c, k
                )
    return tasks


def _learned(case: str, method: str, seed: int) -> dict[str, Any]:
    if method in STAGED:
        row, states = train_staged(method, seed)
    else:
        row, states = train(case, method, seed)
    return row | continued(case, states) if method.endswith("direct") else row


def _path() -> Any:
    return RESULTS / f"lorenz_assimilation_{hardware()}.json"


def _load() -> dict[str, Any]:
    return json.loads(_path().read_text()) if _path().exists() else {}


if __name__ == "__main__":
    main()
