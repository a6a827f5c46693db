"""What a round costs besides arithmetic: operations that are launched, and reads that make the host wait."""

from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that only make tensors; views are known by themselves.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh"}
# What hands values to the host: operations, and methods that on a CPU are none.
_READING_OPERATIONS = {"_local_scalar_dense", "nonzero"}
_READING_METHODS = {"tolist", "cpu", "numpy"}


class RoundCounts:
    """Running counts, and what they were at a certain point of every round."""

    def __init__(self):
        self.launches, self.host_reads = 0, 0
        self._marks: list[tuple[int, int]] = []

    def mark(self, *_) -> None:
        """Call once a round, always at the same point of it."""
        self._marks.append((self.launches, self.host_reads))

    @property
    def per_round(self) -> tuple[int, int] | None:
        """Launches and host reads from one round to the next; None where fewer than two were seen.

        The first mark, the prefill's or of a round that still begins, is left out.
        """
        if len(self._marks) < 3:
            return None
        (launches, host_reads), (next_launches, next_host_reads) = self._marks[1:3]
        return next_launches - launches, next_host_reads - host_reads


@contextmanager
def counted_rounds(device: torch.device):
    """`RoundCounts` of what runs while this is open. Slow; kernels that are launched past PyTorch are not seen.

    The replay of a CUDA graph counts as one launch.
    """
    counts = RoundCounts()
    with ExitStack() as stack:
        stack.enter_context(_counted_replays(counts))
        stack.enter_context(_Operations(counts, device))
        stack.enter_context(_Methods(counts, device))
        yield counts


@contextmanager
def _counted_replays(counts: RoundCounts):
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph) -> None:
        counts.launches += 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted
    try:
        yield
    finally:
        torch.cuda.CUDAGraph.replay = replay


class _Operations(TorchDispatchMode):
    def __init__(self, counts: RoundCounts, device: torch.device):
        super().__init__()
        self._counts, self._device = counts, device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _READING_OPERATIONS:
            self._counts.host_reads += args[0].device == self._device
        elif not func.is_view and name not in _FREE:
            self._counts.launches += 1
            if name == "copy_" and args[0].device.type == "cpu" != self._device.type:
                self._counts.host_reads += args[1].device == self._device
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, counts: RoundCounts, device: torch.device):
        super().__init__()
        self._counts, self._device = counts, device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", None)
        if name in _READING_METHODS or (name == "to" and result.device.type == "cpu" != self._device.type):
            self._counts.host_reads += args[0].device == self._device
        return result
