"""Functions as CUDA graphs, captured as they are: no trace, so that Triton kernels run in them and nothing is refused.

One graph for each set of shapes, and of arguments that are no tensors.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers.utils import logging

logger = logging.get_logger(__name__)


_capturing = threading.Lock()  # one at a time in a process


class GraphSpace:
    """Memory and a stream of a device, for graphs that run one after the other."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: Any  # torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]  # which it reads
    result: Any  # which it writes


class GraphedFunction:
    """`function`, whose first call with arguments of a kind runs it, whose second captures it, and others replay it.

    What a call returns is overwritten by the next one with such arguments. Tensors among these, also in containers and
    registered dataclasses, are copied to where the graph reads them; of everything else it is the same object, or an
    equal one, that makes arguments of a kind. What the function does on the host, a replay leaves out.

    Args:
        scope: is open while the function runs, or is captured.
    """

    def __init__(self, function: Callable, scope: Callable[[], AbstractContextManager], space: GraphSpace):
        self._function, self._scope, self._space = function, scope, space
        self._graphs: dict[tuple, _Graph | None] = {}  # None: it cannot be captured
        self._seen: set[tuple] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kind = (structure, *map(_kind_of, leaves))
        if kind in self._seen and kind not in self._graphs:
            self._graphs[kind] = self._capture(leaves, structure)
        self._seen.add(kind)
        captured = self._graphs.get(kind)
        if captured is None:
            with self._scope():
                return self._function(*args, **kwargs)
        for own, tensor in zip(captured.inputs, tensors, strict=True):
            own.copy_(tensor)
        with torch.cuda.device(self._space.device):
            captured.graph.replay()
        return captured.result

    def forget(self) -> None:
        """Free all graphs; later calls capture again."""
        self._graphs.clear()
        self._seen.clear()

    @property
    def num_graphs(self) -> int:
        """How many were captured."""
        return sum(graph is not None for graph in self._graphs.values())

    def _capture(self, leaves: list, structure) -> _Graph | None:
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, structure)
        try:
            with self._scope():
                graph, result = capture(lambda: self._function(*args, **kwargs), self._space)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning_once(f"{self._function.__name__} cannot be a CUDA graph and runs without: {reason}")
            return None
        return _Graph(graph, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], result)


class CopiedGraph:
    """A function with graphs whose next call does not overwrite what it returned: others may keep it."""

    def __init__(self, function: GraphedFunction):
        self._function = function
        self.forget = function.forget

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, torch.clone, self._function(*args, **kwargs))

    @property
    def num_graphs(self) -> int:
        """How many were captured."""
        return self._function.num_graphs


def capture(run: Callable[[], Any], space: GraphSpace) -> tuple[Any, Any]:
    """`run` as a CUDA graph, and the result that its replays write."""
    with _capturing, torch.cuda.device(space.device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # Other threads may go on with what a capture does not allow.
        settings = {"pool": space.pool, "stream": space.stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **settings):
                result = run()
        finally:  # a capture that fails would leave its own
            torch.cuda.set_stream(stream)
    return graph, result


def _kind_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf
