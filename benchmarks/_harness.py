"""What every benchmark needs: interleaved timing, and a dated report."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from trainax_pk.data import ShuffledOrder
from trainax_pk.step import TrainState
from trainax_pk.trainer import Trainer

RESULTS = pathlib.Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "equinox", "optax", "trainax", "apebench", "pdequinox")


def interleaved(
    runs: dict[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run, one after another in every round; all warmed up before.

    What is done `before` each of them is not in its time.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before()
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median of each run's seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], numerator: str, denominator: str) -> float:
    """Median over rounds of the ratio within a round, which drifts of speed cancel in."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return statistics.median(a / b for a, b in pairs)


def first_call(run: Callable[[], Any]) -> float:
    """Seconds of a call that compiles."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def chunk_program(trainer: Trainer, model: Any, size: int) -> Any:
    """The trainer's program of many updates, lowered and not yet compiled."""
    key = jax.random.key(0)
    order = ShuffledOrder(len(trainer.windows), trainer.batch_size, key)
    state = TrainState.create(model, trainer.optimizer, key=key)
    engine = trainer.engine
    arrays = engine._feed.load(order, 0, size, size)
    zero = np.int32(0)
    return engine._programs._scan.lower(state, arrays, zero, zero, size=size)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" for _ in header) + " |",
    ]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def hardware() -> str:
    """A short name of what the benchmark ran on, for file names and reports."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu{os.cpu_count()}"
    return device.device_kind.lower().replace(" ", "-")


def report(
    name: str, question: str, body: str, conclusion: str = "", *, part: str = ""
) -> pathlib.Path:
    """Prints a dated report and writes it to `results/<name>_<hardware>_<yyyymm>.md`.

    With a `part`, to `results/<name>_<part>_…`: one of several reports of a script.
    """
    today = datetime.datetime.now(datetime.UTC).date()
    versions = ", ".join(f"{p} {_version(p)}" for p in _PACKAGES if _version(p))
    text = "\n".join(
        [
            f"# {question}",
            "",
            f"Date: {today.isoformat()}. Hardware: {hardware()} ({_processor()}, "
            f"{os.cpu_count()} cores). Python {platform.python_version()}, {versions}. "
            f"Printed by `benchmarks/{name}.py`.",
            "",
            body,
            *(["", conclusion] if conclusion else []),
            "",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    stem = f"{name}_{part}" if part else name
    path = RESULTS / f"{stem}_{hardware()}_{today:%Y%m}.md"
    path.write_text(text)
    print(text)
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
