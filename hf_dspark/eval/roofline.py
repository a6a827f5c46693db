"""The fastest decoding a device allows: what it copies and multiplies in a second, and what a round must read and do.

A forward takes at least the time of its bytes (weights, keys and values, once each) or of its operations, whichever is
longer. Launches, activations and what the host does count nothing. W2 is read for each drafted token, since each
needs the one before it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .clock import now

_REPEATS = 5


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What a device reaches at best, as measured."""

    copy_bandwidth: float  # bytes a second, read and written
    matrix_rate: float  # floating point operations a second


@dataclass(frozen=True, slots=True)
class Work:
    """What a forward has to do."""

    num_bytes: float  # read
    num_operations: float

    def seconds(self, rates: DeviceRates) -> float:
        """The least time for it."""
        return max(self.num_bytes / rates.copy_bandwidth, self.num_operations / rates.matrix_rate)


def measure_rates(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    """Copy a tensor larger than any cache and multiply two large matrices; the best of a few times."""
    is_cpu = device.type == "cpu"
    source = torch.ones(2**28 if is_cpu else 2**30, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    copy_seconds = _best_seconds(lambda: copy.copy_(source), device)
    size = 1024 if is_cpu else 8192
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    matrix_seconds = _best_seconds(lambda: torch.mm(matrix, matrix, out=product), device)
    return DeviceRates(2 * source.numel() / copy_seconds, 2 * size**3 / matrix_seconds)


def target_work(target: PreTrainedModel, num_rows: int, context: int, width: int) -> Work:
    """Of a forward of the target over `width` tokens of each of `num_rows` sequences, `context` tokens long."""
    weights = _num_weights(target) - target.get_input_embeddings().weight.numel()
    return _work(target, {num_rows * width: weights}, num_rows, context, width)


def draft_work(draft: PreTrainedModel, target: PreTrainedModel, num_rows: int, context: int, tau: float) -> Work:
    """Of drafting a block for each of `num_rows` sequences, of whose context `tau` tokens are new in the mean."""
    block_size, head = draft.config.block_size, draft.markov_head
    per_token = head.markov_w2.weight.numel()
    weights = _num_weights(draft) - _num_weights(head) - _num_weights(draft.fc)
    weights += target.get_output_embeddings().weight.numel()
    used = {num_rows * block_size: weights + per_token, num_rows * tau: _num_weights(draft.fc)}
    once = _work(draft, used, num_rows, context, block_size)
    again = (block_size - 1) * per_token * draft.dtype.itemsize
    return Work(once.num_bytes + again, once.num_operations)


def _work(model: PreTrainedModel, used: dict[float, int], num_rows: int, context: int, width: int) -> Work:
    """`used`: number of weights by the tokens that each of them multiplies."""
    config, itemsize = model.config, model.dtype.itemsize
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * num_rows * context
    scores = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * num_rows * context * width
    multiplied = sum(tokens * weights for tokens, weights in used.items())
    return Work((sum(used.values()) + keys) * itemsize, 2 * (multiplied + scores))


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    run()  # pays for lazy set-up
    times = []
    for _ in range(_REPEATS):
        start = now(device)
        run()
        times.append(now(device) - start)
    return min(times)
