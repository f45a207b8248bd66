"""The memory that PyTorch's allocator hands out while something runs: what a prediction is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_allocated(run: Callable[[], Any]) -> int:
    """Return the most bytes that `run` has allocated by PyTorch on the CPU at a time, above what it began with.

    What comes from NumPy, and what other threads allocate, is not seen. A CUDA device is asked for the same tensors.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        run()
    assert watched.profiler is not None
    held = peak = 0
    for event in sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak
