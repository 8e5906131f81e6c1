"""Which family of programs to run: decided once, by rule where that is certain."""

import time
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np

Family = Literal["loop", "scan"]

# What a loop on the device is assumed to save, at most, of an update that is long
# against its dispatch: its buffers stay where they are.
_SAVING = 0.25
_ROUNDS = 5
_PROBE_SECONDS = 0.25


class Choice(eqx.Module):
    """Which family runs, and why.

    Attributes:
        family: "loop" (one update per dispatch) or "scan" (many).
        reason: One sentence.
        seconds_per_update: What was measured, by candidate.
        seconds_spent: Time that choosing took, compilation of the candidates included.
    """

    family: str = eqx.field(static=True)
    reason: str = eqx.field(static=True)
    seconds_per_update: dict[str, float] = eqx.field(static=True)
    seconds_spent: float = eqx.field(static=True, default=0.0)


def choose(
    runs: dict[str, Callable[[int], Any]],
    *,
    num_updates: int,
    certain: Choice | None,
) -> Choice:
    """Decides by rule, else by timing both families on updates that are thrown away.

    Args:
        runs: By family, `count -> arrays`: dispatches that many updates from the same
            state, without keeping the result.
        num_updates: Number of updates that lie ahead.
        certain: A choice that needs no measurement, or None.

    Returns:
        The choice. It never costs more than the measurement of a few updates and the
        compilation of the family that is not taken, and not that where a rule decides or
        the run is too short to earn it back.
    """
    if certain is not None:
        return certain
    began = time.perf_counter()
    compile_loop = _timed(runs["loop"], 1)
    dispatch, update = _time_loop(runs["loop"])
    ahead = num_updates * update
    if ahead * max(_SAVING, dispatch / update) < compile_loop:
        reason = (
            f"the run ({ahead:.1f} s) is too short to earn back a second compilation "
            f"({compile_loop:.1f} s)"
        )
        spent = time.perf_counter() - began
        return Choice("loop", reason, {"loop": update}, spent)
    _timed(runs["scan"], 1)
    count = int(np.clip(_PROBE_SECONDS / _ROUNDS / max(update, 1e-7), 2, 200))
    pairs = [
        (_timed(runs["loop"], count) / count, _timed(runs["scan"], count) / count)
        for _ in range(_ROUNDS)
    ]
    loop, scan = (float(np.median(times)) for times in zip(*pairs, strict=True))
    measured = {"loop": loop, "scan": scan}
    family: Family = "scan" if scan < loop else "loop"
    reason = f"measured: loop {loop * 1e3:.3f} ms, scan {scan * 1e3:.3f} ms per update"
    return Choice(family, reason, measured, time.perf_counter() - began)


def faster_for_members(
    together: Callable[[int], Any],
    apart: Callable[[int], Any],
    num_updates: int,
    longest: int,
) -> tuple[bool, str]:
    """Whether an ensemble runs faster vmapped than member by member, measured.

    Args:
        together: `count -> arrays`: that many updates of all members, vmapped.
        apart: The same, a program for each member.
        num_updates: Number of updates that lie ahead.
        longest: The most updates that a call may ask for.

    Returns:
        Whether vmapped, and why.
    """
    compilation = _timed(apart, 1)
    count = 1
    while (seconds := _timed(apart, count)) < _PROBE_SECONDS / _ROUNDS:
        if count == longest:
            break
        count = min(4 * count, longest)
    ahead = num_updates * seconds / count
    if ahead < 2 * compilation:
        return False, (
            f"the run ({ahead:.1f} s) is too short to earn back a second compilation "
            f"({compilation:.1f} s)"
        )
    _timed(together, 1)
    pairs = [(_timed(together, count), _timed(apart, count)) for _ in range(3)]
    vmapped, serial = (float(np.median(t)) / count for t in zip(*pairs, strict=True))
    reason = (
        f"measured: vmapped {vmapped * 1e3:.3f} ms, a program for each member "
        f"{serial * 1e3:.3f} ms per update of all members"
    )
    return vmapped < serial, reason


def _time_loop(run: Callable[[int], Any]) -> tuple[float, float]:
    """Host seconds to dispatch an update, and seconds until it is done."""
    dispatch, done = [], []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        out = run(1)
        dispatch.append(time.perf_counter() - began)
        jax.block_until_ready(out)
        done.append(time.perf_counter() - began)
        if sum(done) > 2 * _PROBE_SECONDS:
            break
    return float(np.median(dispatch)), float(np.median(done))


def _timed(run: Callable[[int], Any], count: int) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(count))
    return time.perf_counter() - began
