"""How much shared memory a kernel's program may have on a device."""

import torch

HOPPER = 227 * 1024


def shared_memory(device: torch.device) -> int:
    """Bytes; a Hopper GPU's on a CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return HOPPER
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
