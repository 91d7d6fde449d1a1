"""What every measurement has in common: a result, a timed call, rounds in shuffled order, peak memory, the report.

A contender is called once (cold: loading and compiling included) and checked; what fails is not timed. The others are
timed in rounds, one sample of each a round, so that all of them meet the same machine; the figure is the median of
the rounds. Each call allocates its output anew.

Peak extra memory is what a contender keeps between calls plus the peak of torch's allocator during a call, less the
output. On a CPU the peak comes from the profiler's record of every allocation.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from .machine import describe

__all__ = ["Progress", "Result", "document", "peak_bytes", "run_rounds", "synchronize", "timed"]

Progress = Callable[[str], None]
Output = TypeVar("Output")


@dataclasses.dataclass
class Result:
    """What came of one contender. Times in milliseconds; None where it did not come to that."""

    name: str
    kind: str
    summary: str
    status: str  # "measured" | "gate failed" | "not executed"
    reason: str | None = None
    error: float | None = None
    bound: float | None = None
    cold_ms: float | None = None
    samples_ms: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None
    held_bytes: int | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def extra_bytes(self) -> int | None:
        """Memory beyond the inputs and the output."""
        if self.peak_bytes is None or self.held_bytes is None:
            return None
        return self.peak_bytes + self.held_bytes

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "median_ms": self.median_ms, "extra_bytes": self.extra_bytes}


def run_rounds(
    running: Sequence[tuple[Result, Callable[[], float]]], rounds: int, progress: Progress = lambda what: None
) -> None:
    """Add to each result the milliseconds that its function gives, once a round."""
    gc.collect()  # so that no collection falls into a timed call
    shuffled = random.Random(0)
    for number in range(rounds):
        # In another order each round: what one leaves behind (caches, freed memory) must not always meet the same.
        for result, sample in shuffled.sample(running, len(running)):
            progress(f"round {number + 1}: {result.name}")
            result.samples_ms.append(sample())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Output], device: torch.device) -> tuple[float, Output]:
    """Milliseconds of one call, and its result: the caller frees it, outside the time."""
    synchronize(device)
    start = time.perf_counter()
    out = call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start), out


def peak_bytes(call: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]], device: torch.device) -> int:
    """Peak of torch's allocator during a call, beyond what was there before and the call's result.

    On a CPU, memory that a library takes from the system itself (MKL's packing buffers) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds announce every start and stop on stderr
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            out = call()
        # The averaged views of the profiler fold allocations into the ops that made them and lose their order.
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events = profiler.profiler.kineto_results.events()
        live = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
    results = (out,) if isinstance(out, torch.Tensor) else out
    return max(0, peak - sum(x.numel() * x.element_size() for x in results))


def document(form: str, rounds: int, **measured: Any) -> dict[str, Any]:
    """A report as plain data: what was measured, when and on what."""
    return {
        "format": form,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(),
        "rounds": rounds,
        **measured,
    }
