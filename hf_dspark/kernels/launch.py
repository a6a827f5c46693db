"""What launches of kernels have in common, and what a device holds for them: of a CPU, which interprets, an H200's."""

import torch

FUSION = {"enable_fp_fusion": True}  # of multiplication and addition; pinned: Triton's default changes from 3.10 on


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def programs_side_by_side(device: torch.device) -> int:
    """How many programs run at the same time: two on a multiprocessor."""
    if device.type != "cuda":
        return 2 * 132
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
