"""Seconds per phase: the host's clocks on a CPU, the device's own events on a GPU.

On a GPU a sample is taken behind a backlog: a spinning kernel holds the queue until the whole sample is in it, so that
the events see kernels and never the host that launches them. A phase that began before all of it was queued is
"starved", and the caller takes the sample again with a longer backlog. Before each phase the L2 cache is overwritten,
as it is between a layer's forward and backward in a real model.
"""

from __future__ import annotations

import functools
import time

import torch

MAX_BACKLOG_S = 0.2
FLUSH_BYTES = 256 * 2**20  # more than twice the largest L2 there is


class Host:
    """Wall seconds and the process's CPU seconds, all threads together."""

    starved = False

    def __init__(self) -> None:
        self.spans: list = []

    def start(self) -> None:
        self.begin = time.perf_counter(), time.process_time()

    def stop(self, phase: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.spans.append((phase, now[0] - self.begin[0], now[1] - self.begin[1]))

    def read(self) -> list[tuple[str, float, float]]:
        """(phase, wall seconds, CPU seconds) of each span, in order."""
        return self.spans


class Device(Host):
    """Wall seconds from events; `backlog` seconds of spinning first, 0 for work that is timed as it is launched."""

    def __init__(self, device: torch.device, backlog: float) -> None:
        super().__init__()
        self.backlog, self.cold = backlog, _cold(device)
        torch.cuda.synchronize(device)
        if backlog:
            torch.cuda._sleep(int(min(backlog, MAX_BACKLOG_S) * _cycles_per_second(device)))
        self.queued = time.perf_counter()

    def start(self) -> None:
        self.cold.zero_()
        self.begin = _event(), time.process_time()

    def stop(self, phase: str) -> None:
        first, cpu = self.begin
        self.spans.append((phase, first, _event(), time.process_time() - cpu))
        self.starved |= bool(self.backlog) and first.query()

    def read(self) -> list[tuple[str, float, float]]:
        self.queued = time.perf_counter() - self.queued  # seconds the host took to queue everything
        torch.cuda.synchronize()
        return [(phase, a.elapsed_time(b) / 1e3, cpu) for phase, a, b, cpu in self.spans]


def seconds(fn, device: torch.device, repeats: int = 5) -> float:
    """The least of `repeats` timings of fn() on a GPU, cold cache, host not counted."""
    found, backlog = [], 1e-3
    for _ in range(repeats + 3):
        clock = Device(device, backlog)
        clock.start()
        fn()
        clock.stop("")
        ((_, wall, _),) = clock.read()
        if clock.starved and backlog < MAX_BACKLOG_S:
            backlog = longer(clock)
            continue
        found.append(wall)
        if len(found) == repeats:
            break
    return min(found or [wall])


def longer(clock: Device) -> float:
    """A backlog that would have held this clock's sample."""
    return min(MAX_BACKLOG_S, max(2 * clock.backlog, 2 * clock.queued))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@functools.cache
def _cold(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


@functools.cache
def _cycles_per_second(device: torch.device) -> float:
    torch.cuda._sleep(1_000_000)  # the first launch loads the kernel
    torch.cuda.synchronize(device)
    first = _event()
    torch.cuda._sleep(10_000_000)
    last = _event()
    torch.cuda.synchronize(device)
    return 10_000_000 / (first.elapsed_time(last) / 1e3)
