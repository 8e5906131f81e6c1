"""Runs APEBench experiments with trainax, or with this package in its place.

    python -m benchmarks._apebench_run {trainax,compat} CASES.json RESULTS.npz

A process of its own for each package: APEBench binds trainax when it is imported. CASES
is a list of `{"name", "scenario", "net", "train", "task", "seeds", "options"}`; with
"nudged" the initial weights are multiplied by 1 + 2⁻²³, a rounding of single precision.
RESULTS holds by name the losses (seeds, updates), the errors of the test rollout (seeds,
times), the number and sum of what the callbacks returned, and the seconds of the whole
run.
"""

import importlib
import json
import pathlib
import sys
import time
import warnings
from typing import Any

import equinox as eqx
import jax
import numpy as np


def run_case(apebench: Any, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """One experiment; what apebench returns, on the host."""
    kind = apebench.scenarios.scenario_dict[case["scenario"]]
    if case.get("nudged"):
        kind = nudged(kind)
    scenario = kind(**case["options"])
    began = time.perf_counter()
    results = scenario.run_raw(
        task_config=case.get("task", "predict"),
        network_config=case["net"],
        train_config=case["train"],
        num_seeds=case["seeds"],
    )
    model, losses, aux, metrics, rollout, _ = jax.block_until_ready(
        eqx.filter(results, eqx.is_array)
    )
    seconds = time.perf_counter() - began
    filled = [sorted(k for k, v in x.items() if v is not None) for x in results[2]]
    sums = [float(np.sum(x, dtype=np.float64)) for x in jax.tree.leaves(aux)]
    del model
    return {
        "losses": np.asarray(losses),
        "errors": np.asarray(metrics["mean_nRMSE"]),
        "rollout": np.asarray(rollout),
        "callbacks": np.asarray(json.dumps(filled)),
        "callback_sums": np.asarray(sums),
        "seconds": np.asarray(seconds),
    }


def nudged(kind: Any) -> Any:
    """The scenario, whose networks begin one rounding beside their initial weights."""

    class Nudged(kind):
        def get_neural_stepper(self, **options: Any) -> Any:
            made = super().get_neural_stepper(**options)
            weights, rest = eqx.partition(made, eqx.is_inexact_array)
            weights = jax.tree.map(lambda x: x * x.dtype.type(1 + 2.0**-23), weights)
            return eqx.combine(weights, rest)

    return Nudged


def main(package: str, cases: str, results: str) -> None:
    """Runs all cases and writes what they return."""
    warnings.simplefilter("ignore")
    if package == "compat":
        sys.modules["trainax"] = importlib.import_module("trainax_pk.compat")
    apebench = importlib.import_module("apebench")
    found = {}
    for case in json.loads(pathlib.Path(cases).read_text()):
        for key, value in run_case(apebench, case).items():
            found[f"{case['name']}/{key}"] = value
        jax.clear_caches()
    np.savez(results, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
