"""Runs many updates with one host round trip per chunk."""

from trainax_pk.engine._choice import Choice
from trainax_pk.engine._chunks import ChunkClock, chunk_size, join_chunks
from trainax_pk.engine._engine import Engine
from trainax_pk.engine._fast_convolutions import (
    fast_convolutions,
    has_loop_convolutions,
    inspect_loops,
    platform_needs_it,
)
from trainax_pk.engine._feed import DeviceFeed, HostFeed, make_feed
from trainax_pk.engine._feed_base import AbstractFeed
from trainax_pk.engine._inspect import Work, inspect_work
from trainax_pk.engine._rewrite import make_rewrite
from trainax_pk.engine._share import Share
from trainax_pk.engine._stream_feed import StreamFeed

__all__ = [
    "AbstractFeed",
    "Choice",
    "ChunkClock",
    "DeviceFeed",
    "Engine",
    "HostFeed",
    "Share",
    "StreamFeed",
    "Work",
    "chunk_size",
    "fast_convolutions",
    "has_loop_convolutions",
    "inspect_loops",
    "inspect_work",
    "join_chunks",
    "make_feed",
    "make_rewrite",
    "platform_needs_it",
]
