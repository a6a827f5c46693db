"""Which keys the positions of a draft's block see. Keys lie in the order of their positions, the block last."""

import torch


def draft_masks(
    layer_types: list[str],
    num_inputs: int,
    num_keys: int,
    *,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> dict[str, torch.Tensor | None]:
    """For each layer type a mask [1, 1, num_inputs, num_keys], True where seen; None where every position sees all.

    A window of w shows positions less than w before the query. `causal` hides the rest of the block.
    """
    rows = torch.arange(num_keys - num_inputs, num_keys, device=device).unsqueeze(-1)
    columns = torch.arange(num_keys, device=device)
    masks: dict[str, torch.Tensor | None] = {}
    for layer_type in set(layer_types):
        is_cut = layer_type == "sliding_attention" and num_keys > window
        mask = None
        if causal or is_cut:
            mask = columns <= rows if causal else torch.ones(num_inputs, num_keys, dtype=torch.bool, device=device)
            if is_cut:
                mask = mask & (rows - columns < window)
            mask = mask[None, None]
        masks[layer_type] = mask
    return masks
