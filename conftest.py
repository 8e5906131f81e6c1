"""Examples run as a reader would run them: in single precision."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _single_precision_examples(request: pytest.FixtureRequest) -> Iterator[None]:
    # tests/conftest.py switches to double precision for everything else.
    if isinstance(request.node, pytest.DoctestItem):
        with jax.enable_x64(False):
            yield
    else:
        yield
