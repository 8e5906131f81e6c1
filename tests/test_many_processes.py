"""Several processes that train one model: the losses of one device, whatever happens."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tests._processes_driver as driver

ROOT = Path(__file__).parent.parent


def launch(folder, count, what, seconds=400):
    """Status, output and errors of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # One device each.
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests._processes_driver"]
    children = [
        subprocess.Popen(
            [*command, str(i), str(count), str(port), what, str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        outputs = [child.communicate(timeout=seconds) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(c.returncode, *o) for c, o in zip(children, outputs, strict=True)]


def events(folder):
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "names"), [(2, "replicated,host,sharded,streamed"), (4, "sharded")]
)
def test_several_processes_give_the_losses_of_one(count, names, tmp_path):
    results = launch(tmp_path, count, names)
    assert [code for code, _, _ in results] == [0] * count, results[0][2][-3000:]
    reports = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    for report in reports:
        assert list(report) == names.split(",")
        for name, row in report.items():
            alone = reports[0][name]["alone"]
            assert row["stopped"] == 9 and row["curves"].keys() == alone.keys()
            for curve, values in row["curves"].items():
                np.testing.assert_allclose(
                    values, alone[curve], rtol=1e-9, err_msg=f"{name}, {curve}"
                )
            assert row["part"] == (1 / count if name == "sharded" else 1)
    # One of them has written: each line once.
    steps = [
        json.loads(line)["event"]
        for line in (tmp_path / "sharded" / "events.jsonl").read_text().splitlines()
    ]
    assert steps == ["started", "stopped", "resumed", "finished"]


@pytest.mark.slow
def test_a_signal_to_one_ends_all_after_saving(tmp_path):
    results = launch(tmp_path, 2, "SIGTERM")
    assert [code for code, _, _ in results] == [143, 143], results[0][2][-3000:]
    assert events(tmp_path)[-1]["event"] == "interrupted"
    finish_on_one_device(tmp_path / "run", at_least=12)


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_one_device_goes_on(tmp_path):
    began = time.monotonic()
    (code, _, message), (killed, _, _) = launch(tmp_path, 2, "SIGKILL")
    assert killed == -signal.SIGKILL and code not in (0, None)
    assert "ProcessLost: Expected 2 processes to compute together" in message
    assert "Start again with the same run_dir" in message
    assert time.monotonic() - began < 120
    finish_on_one_device(tmp_path / "run", at_least=8)


def finish_on_one_device(run_dir, at_least):
    trainer = driver.make(None)
    resumed = driver.train(trainer, run_dir=run_dir)
    alone = driver.train(trainer)
    np.testing.assert_allclose(resumed.loss, alone.loss, rtol=1e-9)
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    found = [json.loads(x) for x in lines if '"resumed"' in x][-1]
    assert at_least <= found["step"] < driver.TOTAL
    assert found["changed"]["devices"] == "2 was saved, now 1"
