"""Time contestants fairly: in turns whose order changes, with the device synchronised around each turn."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch


@dataclass
class Contestant:
    """What is timed.

    step: does one step, of any number of images. flops: floating-point operations per image. state_bytes: what the
    contestant keeps on the device between its turns (weights, optimizer, a teacher); 0 if it trains nothing.
    """

    step: Callable[[], object]
    flops: float | None = None
    state_bytes: int = 0


class Pace(NamedTuple):
    """The steps of a turn."""

    steps: int  # timed
    settle: int  # before them, untimed: they empty queues that filled while others had their turns


@dataclass
class Timing:
    """The turns of one contestant."""

    contestant: Contestant
    turns: list[float] = field(default_factory=list)  # seconds of a step
    memory: int | None = None  # bytes of tensors at the peak of a step; None on CPUs for what trains nothing

    @property
    def seconds(self) -> float:
        """The median time of a step."""
        return median(self.turns)

    def ratio(self, first: "Timing") -> float:
        """Compare with another contestant's time, by pairs of the same turn."""
        return median(mine / other for mine, other in zip(self.turns, first.turns, strict=True))


class Stopwatch:
    """Times steps on a device."""

    def __init__(self, device: torch.device, repeats: int, compiled: bool):
        self.on_gpu = device.type == "cuda"
        self.repeats = repeats
        self.usual_pace = Pace(steps=1, settle=0)
        if compiled:
            self.usual_pace = Pace(steps=1, settle=2)
        if self.on_gpu:
            self.usual_pace = Pace(steps=10, settle=2)

    def seconds(self, step: Callable[[], object], pace: Pace, clock: Callable[[], float] = time.perf_counter) -> float:
        """Time a step, in seconds of the clock; the device is synchronised before and after."""
        self._repeat(step, pace.settle)
        start = clock()
        self._repeat(step, pace.steps)
        return (clock() - start) / pace.steps

    def _repeat(self, step: Callable[[], object], times: int) -> None:
        for _ in range(times):
            step()
        if self.on_gpu:
            torch.cuda.synchronize()

    def take_turns(self, contestants: dict[str, Contestant], pace: Pace) -> dict[str, Timing]:
        """Time contestants in turns, the order of which changes; gives a timing for each name."""
        timings = {name: Timing(contestant) for name, contestant in contestants.items()}
        for name in contestants:  # compilation, allocators and optimizers warm up
            self._take_turn(timings[name], pace)
            timings[name].turns.clear()
        for turn in range(1, self.repeats + 1):
            for name in order_of_turn(list(contestants), turn):
                self._take_turn(timings[name], pace)
        if not self.on_gpu:
            for timing in timings.values():
                measure_memory(timing)
        return timings

    def _take_turn(self, timing: Timing, pace: Pace) -> None:
        contestant = timing.contestant
        if not self.on_gpu:
            timing.turns.append(self.seconds(contestant.step, pace))
            return
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - contestant.state_bytes
        timing.turns.append(self.seconds(contestant.step, pace))
        timing.memory = torch.cuda.max_memory_allocated() - others


def measure_memory(timing: Timing) -> None:
    """Measure the memory of one more step on the CPU, of a contestant that trains."""
    contestant = timing.contestant
    if contestant.state_bytes:
        timing.memory = contestant.state_bytes + most_allocated(contestant.step)


def most_allocated(step: Callable[[], object]) -> int:
    """Find the most bytes that a step has allocated at a time, beyond what there was before it.

    PyTorch's allocator on CPUs counts only for its profiler, which writes its running total into a trace.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own remarks are for its authors
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return max(totals, default=0)


def order_of_turn(names: list[str], turn: int) -> list[str]:
    """Arrange contestants so that, over the turns, each one comes early and late, and after different ones."""
    first = turn // 2 % len(names)
    order = names[first:] + names[:first]
    if turn % 2 == 1:
        order.reverse()
    return order
