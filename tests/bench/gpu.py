"""What every kernel benchmark shares: the copy bandwidth, graph timing, the machine's name."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import triton

from dflash_chat.runtime.measure import copy_bandwidth

__all__ = ["copy_bandwidth", "graph_seconds", "machine"]


def machine() -> str:
    """GPU and versions, for a note's first line."""
    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def graph_seconds(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median seconds of one call: `calls` in a row as one CUDA graph, replayed.

    Give every call its own weights, more than 400 MB in all, or the L2 cache is measured.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(calls)
