"""What a backend needs done to an update before it is compiled."""

from collections.abc import Callable
from typing import Any

Transformation = Callable[[Callable[..., Any]], Callable[..., Any]]


def make_rewrite(platform: str, num_updates: int) -> Transformation:
    """The transformation of a finished update for a platform."""
    del platform, num_updates
    return lambda fn: fn
