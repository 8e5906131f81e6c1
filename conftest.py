"""Settings under which every test runs: double precision, no silent broadcasting.

Here and not in tests/, as pytest reads this file first, and jax its settings when it is
imported.
"""

import atexit
import gc
import itertools
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Before jax is imported.
os.environ.setdefault("TQDM_DISABLE", "1")
# Compilation is most of the time of these tests, and a quarter of it goes into machine
# code that runs once. What XLA makes of a program before that is untouched. The second
# run of .ci/run sets this to 0: there programs are compiled as users have them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "XLA_FLAGS" not in os.environ:
    # Several "devices" on one CPU, for the sharding tests.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    # Of two ways to write fused loops the newer costs a fifth of compilation. This JAX
    # has both, later ones have no choice.
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    if quick and version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Many tests compile the same small programs, and so do the processes that they start:
# whoever comes second reads them from a folder that lives as long as this run of pytest.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="trainax_pk_programs_")
    atexit.register(_programs.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

# Tracing makes many objects and few cycles: a sixth of the time went into the search for
# them, again and again among the modules imported.
gc.set_threshold(50_000, 10, 10)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

_MOST_MAPS = 20_000
_done = itertools.count(1)


@pytest.fixture(autouse=True)
def _single_precision_examples(request: pytest.FixtureRequest) -> Iterator[None]:
    # Examples run as a reader would run them.
    if isinstance(request.node, pytest.DoctestItem):
        with jax.enable_x64(False):
            yield
    else:
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Examples that train or sample are slow: those of these packages."""
    heavy = tuple(f"trainax_pk/{x}/" for x in ("amortized", "experiment", "solver"))
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.nodeid.startswith(heavy):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What the imports made stays: it is not searched again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """Lets go of compiled programs when there are many.

    Each holds about ten maps of memory, and Linux gives a process 65,530: where they end
    the compiler aborts, and the worker with it.
    """
    maps = Path("/proc/self/maps")
    if next(_done) % 10 or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()
