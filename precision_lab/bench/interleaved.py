"""Interleaved timing: every candidate once a round, between two calls of the baseline, and the median of the ratios.

On a shared machine times drift by more than the differences of interest; two calls a few milliseconds apart do not.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True)
class Timing:
    """How long one candidate took.

    Attributes:
      name: the candidate.
      median_s: median seconds of a call.
      ratio: median over rounds of its time over that of the baseline, called just before and after.
      low: first quartile of that ratio.
      high: third quartile of that ratio.
    """

    name: str
    median_s: float
    ratio: float
    low: float
    high: float


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    budget_s: float,
    on_round: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Returns the timings of candidates, the first of which is the baseline of all ratios.

    Args:
      candidates: functions without arguments that return when their work is done; each is called twice beforehand.
      rounds: timed calls of each candidate; each comes after one that is not timed.
      budget_s: seconds of timed calls of one candidate; slow ones are called in fewer rounds, at least three.
      on_round: called when a round is done.

    Raises:
      ValueError: fewer than three rounds, which have no quartiles.
    """
    if rounds < 3:
        raise ValueError(f"rounds must be at least 3, got {rounds}.")
    allowed = {}
    for name, call in candidates.items():
        call()
        allowed[name] = max(3, min(rounds, int(budget_s / max(_seconds(call), 1e-9))))
    spent: dict[str, list[float]] = {name: [] for name in candidates}
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    baseline = next(iter(candidates.values()))
    for number in range(rounds):
        for name, call in candidates.items():
            if number >= allowed[name]:
                continue
            # Untimed, so that both find their code in the caches, and the array where the other leaves it.
            call()
            baseline()
            before, seconds, after = _seconds(baseline), _seconds(call), _seconds(baseline)
            spent[name].append(seconds)
            ratios[name].append(2 * seconds / (before + after))
        on_round()
    return [_timing(name, spent[name], ratios[name]) for name in candidates]


def time_alternating(name: str, baseline: Callable[[], Any], call: Callable[[], Any], *, rounds: int) -> Timing:
    """Returns the timing of `call` in turns with the baseline, for calls of seconds that no cache makes faster.

    Args:
      name: the candidate.
      baseline, call: functions without arguments, each called once beforehand.
      rounds: calls of the candidate, at least three; the baseline is called before and after each.

    Raises:
      ValueError: fewer than three rounds, which have no quartiles.
    """
    if rounds < 3:
        raise ValueError(f"rounds must be at least 3, got {rounds}.")
    baseline()
    call()
    times, spent = [_without_garbage(baseline)], []
    for _ in range(rounds):
        spent.append(_without_garbage(call))
        times.append(_without_garbage(baseline))
    return _timing(name, spent, [2 * s / (a + b) for s, a, b in zip(spent, times, times[1:], strict=False)])


def _without_garbage(call: Callable[[], Any]) -> float:
    """Returns how long one call takes from a heap without garbage, whose collection would fall on calls at random."""
    gc.collect()
    return _seconds(call)


def _seconds(call: Callable[[], Any]) -> float:
    """Returns how long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _timing(name: str, spent: list[float], ratios: list[float]) -> Timing:
    """Returns medians and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Timing(name, statistics.median(spent), middle, low, high)


def environment(packages: tuple[str, ...]) -> dict[str, Any]:
    """Returns what a timing depends on: device, cores, Python, and the versions of those packages that are there.

    On a CPU `bfloat16_units` are those of its instructions, of `BFLOAT16_UNITS`, that multiply in bfloat16.
    """
    import jax

    device = jax.devices()[0]
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "platform": device.platform,
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "bfloat16_units": _bfloat16_units() if device.platform == "cpu" else [],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    """Returns the name of the processor, as far as the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _bfloat16_units() -> list[str]:
    """Returns the flags of the processor among `BFLOAT16_UNITS`, as far as the system tells them."""
    flags = _cpuinfo("flags").split()
    return [unit for unit in BFLOAT16_UNITS if unit in flags]


def _cpuinfo(key: str) -> str:
    """Returns a value of the first processor in /proc/cpuinfo, or an empty string."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
    except OSError:
        return ""
