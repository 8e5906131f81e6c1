"""Does APEBench 0.1.1 give the same, sooner, with this package in trainax's place?

    python -m benchmarks.apebench_compat agreement [CASES]
    python -m benchmarks.apebench_compat rounding [CASES]
    python -m benchmarks.apebench_compat rates [ROUNDS]
    python -m benchmarks.apebench_compat whole [NETWORK]

APEBench is not touched: `sys.modules["trainax"]` is set before it is imported. The two
packages run in processes of their own, in turn. Every call adds its figures to the data
beside the report and writes the report anew.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS, hardware, report, table

PACKAGES = ("trainax", "compat")
NETS = {
    "FNO": "FNO;12;18;4;gelu",
    "Conv": "Conv;34;10;relu",
    "Res": "Res;26;8;relu",
}
SCENARIOS = {
    "advection": "diff_adv",
    "Burgers": "diff_burgers",
    "KdV": "diff_kdv",
    "KS": "diff_ks",
}
TRAINS = ("one", "sup;5", "div;3;True;True")
CALLBACKS = ("net;50,weight_norm;25", "metrics;50", "sample_rollout;50", "")
# Runs of so many updates give a rate by their difference, without what is constant.
SHORT, LONG, WHOLE = 100, 600, 10_000
# Updates whose losses are compared.
COMPARED = 100
ASKED = 1e-5
FIGURES = RESULTS / f"apebench_compat_{hardware()}.json"


def case(scenario: str, net: str, train: str, updates: int, **more: Any) -> dict:
    """One experiment at the sizes of the paper, with as many updates."""
    schedule = f"adam;{updates};warmup_cosine;0.0;1e-3;{updates // 5}"
    options = {"optim_config": schedule, "record_loss_every": 1}
    return {
        "name": f"{scenario}, {net}, {train}",
        "scenario": SCENARIOS[scenario],
        "net": NETS[net],
        "train": train,
        "seeds": more.get("seeds", 1),
        "options": options | {"callbacks": more.get("callbacks", "")},
    }


def run(
    package: str,
    cases: Sequence[dict],
    folder: pathlib.Path,
    *,
    timed: bool,
    double: bool = False,
) -> Any:
    """The cases in a new process; compiled programs are kept unless it is timed."""
    specification, results = folder / "cases.json", folder / f"{package}.npz"
    specification.write_text(json.dumps(list(cases)))
    command = [sys.executable, "-m", "benchmarks._apebench_run"]
    environment = os.environ | {"TQDM_DISABLE": "1", "JAX_PLATFORMS": "cpu"}
    if double:
        environment["JAX_ENABLE_X64"] = "1"
    if not timed:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    subprocess.run(
        [*command, package, specification, results], check=True, env=environment
    )
    with np.load(results) as found:
        return dict(found)


def in_turn(
    one: dict,
    *,
    timed: bool = True,
    double: bool = False,
    packages: Sequence[str] = PACKAGES,
) -> dict[str, dict[str, np.ndarray]]:
    """Packages on one case."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for package in packages:
            folder = pathlib.Path(name)
            found = run(package, [one], folder, timed=timed, double=double)
            results[package] = {k.rpartition("/")[2]: v for k, v in found.items()}
    return results


def geometric_mean(errors: np.ndarray) -> float:
    """Of the nRMSE over 100 test times, as the paper has it; median over seeds."""
    return float(np.median(np.exp(np.mean(np.log(errors[:, :100]), axis=1))))


def compare(found: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """How far the two packages' losses and errors lie apart."""
    theirs, ours = (found[p] for p in PACKAGES)
    a, b = (x["losses"][:, :COMPARED].astype(np.float64) for x in (theirs, ours))
    sums = [x["callback_sums"] for x in (theirs, ours)]
    return {
        "losses": float(np.max(np.abs(a - b) / np.abs(a))),
        "error trainax": geometric_mean(theirs["errors"]),
        "error compat": geometric_mean(ours["errors"]),
        "callbacks": bool(theirs["callbacks"] == ours["callbacks"])
        and bool(np.allclose(*sums, rtol=1e-3, atol=1e-3)),
        "seconds trainax": float(theirs["seconds"]),
        "seconds compat": float(ours["seconds"]),
    }


def agreement_cases() -> list[dict]:
    """The Fourier network everywhere; the others with every scenario and training."""
    combinations = [(s, "FNO", t) for s in SCENARIOS for t in TRAINS]
    for i, scenario in enumerate(SCENARIOS):
        combinations.append((scenario, "Conv", TRAINS[i % 3]))
        combinations.append((scenario, "Res", TRAINS[(i + 1) % 3]))
    return [
        case(s, n, t, COMPARED, seeds=2, callbacks=CALLBACKS[i % 4])
        for i, (s, n, t) in enumerate(combinations)
    ]


def agreement(first: str = "0", last: str = "99") -> None:
    """Losses, errors and callbacks of two seeds; the cases `first … last - 1`."""
    data = load()
    for one in agreement_cases()[int(first) : int(last)]:
        found = compare(in_turn(one, timed=False)) | {
            "callbacks asked": one["options"]["callbacks"]
        }
        data["agreement"][one["name"]] = found
        store(data)


def rounding(first: str = "0", last: str = "99") -> None:
    """Cases whose losses differ by more than asked: are they faults, or rounding?

    Both packages in double precision; and in single precision trainax against itself,
    with initial weights one rounding apart.
    """
    data = load()
    cases = [c for c in agreement_cases() if c["name"] in data["agreement"]]
    apart = [c for c in cases if data["agreement"][c["name"]]["losses"] > ASKED]
    for one in apart[int(first) : int(last)]:
        double = compare(in_turn(one, timed=False, double=True))
        runs = [
            in_turn(one | {"nudged": nudged}, timed=False, packages=PACKAGES[:1])
            for nudged in (False, True)
        ]
        both = dict(zip(PACKAGES, (x["trainax"] for x in runs), strict=True))
        itself = compare(both)
        data.setdefault("rounding", {})[one["name"]] = {
            "single": data["agreement"][one["name"]]["losses"],
            "double": double["losses"],
            "nRMSE in double": double["error compat"] / double["error trainax"] - 1,
            "callbacks in double": double["callbacks"],
            "trainax itself": itself["losses"],
        }
        store(data)


def rates(rounds: str = "3", *nets: str) -> None:
    """Time per update of one-step training on advection, packages in turn."""
    data = load()
    for _ in range(int(rounds)):
        for net in nets or ("FNO", "Conv"):
            both = [in_turn(case("advection", net, "one", n)) for n in (SHORT, LONG)]
            short, long = ({p: float(x[p]["seconds"]) for p in PACKAGES} for x in both)
            data["rates"].setdefault(net, []).append({"short": short, "long": long})
            store(data)


def whole(net: str = "FNO", scenario: str = "advection") -> None:
    """A whole run of 10,000 updates."""
    data = load()
    one = case(scenario, net, "one", WHOLE)
    data["whole"][one["name"]] = compare(in_turn(one))
    store(data)


def load() -> dict[str, Any]:
    """Figures of earlier calls."""
    if FIGURES.exists():
        return json.loads(FIGURES.read_text())
    return {"agreement": {}, "rates": {}, "whole": {}}


def store(data: dict[str, Any]) -> None:
    """Keeps the figures and writes the report."""
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(data, indent=1) + "\n")
    report(
        "apebench_compat",
        "APEBench 0.1.1 with trainax_pk.compat in trainax's place",
        "\n\n".join(
            [
                *_whole(data["whole"]),
                *_rates(data["rates"]),
                *_agreement(data),
                *_rounding(data.get("rounding", {})),
            ]
        ),
    )


def _whole(found: dict[str, Any]) -> list[str]:
    header = ["run", "trainax (s)", "compat (s)", "ratio"]
    header += ["nRMSE trainax", "nRMSE compat", "first 100 losses differ by"]
    rows = [
        [
            name,
            f"{x['seconds trainax']:.1f}",
            f"{x['seconds compat']:.1f}",
            f"**{x['seconds compat'] / x['seconds trainax']:.2f}**",
            f"{x['error trainax']:.4f}",
            f"{x['error compat']:.4f}",
            f"{x['losses']:.1e}",
        ]
        for name, x in found.items()
    ]
    text = (
        "Whole runs of 10,000 updates, one seed: data, compilation, training, test "
        "rollouts. nRMSE: geometric mean over 100 test times."
    )
    return [f"## Whole runs\n\n{text}", table(header, rows)] if rows else []


def _rates(found: dict[str, Any]) -> list[str]:
    rows = []
    for net, rounds in found.items():
        rate = {
            p: statistics.median(
                (x["long"][p] - x["short"][p]) / (LONG - SHORT) for x in rounds
            )
            for p in PACKAGES
        }
        total = {
            p: statistics.median(x["short"][p] for x in rounds)
            + (WHOLE - SHORT) * rate[p]
            for p in PACKAGES
        }
        cells = [f"{1e3 * rate[p]:.2f}" for p in PACKAGES]
        cells.append(f"{rate['compat'] / rate['trainax']:.2f}")
        cells += [f"{total[p]:.0f}" for p in PACKAGES]
        cells.append(f"**{total['compat'] / total['trainax']:.2f}**")
        rows.append([net, len(rounds), *cells])
    header = ["network", "rounds", "trainax (ms/update)", "compat", "ratio"]
    header += ["trainax, 10,000 (s)", "compat, 10,000 (s)", "ratio"]
    text = (
        f"Advection, one-step training, one seed. Runs of {SHORT} and {LONG} updates in "
        "turn; the rate is their difference, the time of 10,000 updates the shorter run "
        "(with all that is constant) and the rest at that rate. Medians over rounds."
    )
    return [f"## Rates\n\n{text}", table(header, rows)] if rows else []


def _agreement(data: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{x['losses']:.1e}",
            f"{x['error compat'] / x['error trainax'] - 1:+.1e}",
            x["callbacks asked"] or "none",
            "equal" if x["callbacks"] else "**differ**",
        ]
        for name, x in data["agreement"].items()
    ]
    header = ["scenario, network, training", "losses differ by", "nRMSE differs by"]
    header += ["callbacks", "their results"]
    text = (
        f"Two seeds under APEBench's own vmap, {COMPARED} updates at the sizes of the "
        "paper, the same keys: largest relative difference of the losses, and of the "
        "geometric-mean nRMSE over 100 test times."
    )
    return [f"## Agreement\n\n{text}", table(header, rows)] if rows else []


def _rounding(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{x['single']:.1e}",
            f"{x['trainax itself']:.1e}",
            f"{x['double']:.1e}",
            f"{x['nRMSE in double']:+.1e}",
            "equal" if x["callbacks in double"] else "**differ**",
        ]
        for name, x in found.items()
    ]
    header = ["scenario, network, training", "single"]
    header += ["trainax, nudged weights, single", "double", "nRMSE, double"]
    header += ["callbacks, double"]
    text = (
        f"Cases of the table above beyond {ASKED:.0e}: largest relative difference of the "
        f"losses over {COMPARED} updates; that of trainax from itself when its initial "
        "weights are multiplied by 1 + 2⁻²³; and that of the packages in double precision. "
        "Adam divides a gradient by its size, so rounding of small gradients grows to the "
        "size of an update."
    )
    return [f"## Rounding\n\n{text}", table(header, rows)] if rows else []


if __name__ == "__main__":
    parts = {
        "agreement": agreement,
        "rounding": rounding,
        "rates": rates,
        "whole": whole,
    }
    parts[sys.argv[1]](*sys.argv[2:])
