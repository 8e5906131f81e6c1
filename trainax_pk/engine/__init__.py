"""Runs many updates with one host round trip per chunk."""

from trainax_pk.engine._choice import Choice
from trainax_pk.engine._engine import ChunkClock, Engine, chunk_size
from trainax_pk.engine._feed import AbstractFeed, DeviceFeed, HostFeed, make_feed
from trainax_pk.engine._inspect import Work, inspect_work

__all__ = [
    "AbstractFeed",
    "Choice",
    "ChunkClock",
    "DeviceFeed",
    "Engine",
    "HostFeed",
    "Work",
    "chunk_size",
    "inspect_work",
    "make_feed",
]
