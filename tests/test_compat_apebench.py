"""APEBench 0.1.1, which knows nothing of this package, on trainax and in its place."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "num_points": 24,
    "num_train_samples": 6,
    "train_temporal_horizon": 8,
    "num_test_samples": 3,
    "test_temporal_horizon": 4,
    "batch_size": 5,
    "optim_config": "adam;9;warmup_cosine;0.0;1e-3;2",
    "record_loss_every": 1,
}
# Each scenario, network, training and callback once; benchmarks/apebench_compat.py has
# the whole table, at the sizes of the paper.
TABLE = (
    ("diff_adv", "one", "FNO;4;5;2;gelu", "net;4,weight_norm;2"),
    ("diff_burgers", "sup;5", "Conv;5;2;relu", "metrics;4"),
    ("diff_kdv", "div;3;True;True", "Res;5;1;relu", "sample_rollout;5"),
    ("diff_ks", "one", "Conv;5;2;relu", ""),
)


def cases():
    """What is asked of APEBench, with two seeds under its own vmap."""
    for scenario, train, net, callbacks in TABLE:
        yield {
            "name": scenario,
            "scenario": scenario,
            "net": net,
            "train": train,
            "seeds": 2,
            "options": SMALL | {"callbacks": callbacks},
        }


# As in conftest.py: cycles are searched for less often.
RUN = """
import gc, sys
from benchmarks import _apebench_run
gc.set_threshold(50_000, 10, 10)
_apebench_run.main(*sys.argv[1:])
"""
NAMES = [case["name"] for case in cases()]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apebench")
    specification = folder / "cases.json"
    specification.write_text(json.dumps(list(cases())))
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    environment = os.environ | {
        "TQDM_DISABLE": "1",
        "JAX_PLATFORMS": "cpu",
        # Compilation is nearly all of the time; APEBench's own programs are shared.
        "XLA_FLAGS": " ".join([*flags, "--xla_backend_optimization_level=0"]),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    found = {}
    for package in ("trainax", "compat"):
        file = folder / f"{package}.npz"
        command = [sys.executable, "-c", RUN, package, specification, file]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        found[package] = np.load(file)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_losses(results, name):
    ours, theirs = (results[p][f"{name}/losses"] for p in ("compat", "trainax"))
    assert ours.shape == theirs.shape
    assert np.ptp(theirs) > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_errors_and_rollouts(results, name):
    for what in ("errors", "rollout"):
        ours, theirs = (results[p][f"{name}/{what}"] for p in ("compat", "trainax"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_callbacks(results, name):
    ours, theirs = (results[p][f"{name}/callbacks"] for p in ("compat", "trainax"))
    assert ours == theirs
    sums = [results[p][f"{name}/callback_sums"] for p in ("compat", "trainax")]
    np.testing.assert_allclose(*sums, rtol=1e-4, atol=1e-4)
