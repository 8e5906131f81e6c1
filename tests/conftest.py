"""Settings under which every test runs: double precision, no silent broadcasting."""

import os

# Before jax is imported: several "devices" on one CPU, for the sharding tests.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("TQDM_DISABLE", "1")

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
