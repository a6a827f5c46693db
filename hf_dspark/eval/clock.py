"""The clock of the benchmarks."""

import time

import torch


def now(device: torch.device) -> float:
    """Seconds, read when all work given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
