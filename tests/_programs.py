"""Compiled programs that tests of one file share."""

import contextlib

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def compilation_cache(folder):
    """Within it, a program that was compiled before is read from a folder."""
    settings = {"jax_compilation_cache_dir": str(folder), **SETTINGS}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
