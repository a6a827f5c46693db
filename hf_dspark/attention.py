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

    Sliding layers see the last `window` positions of the context, counted from the anchor, and the block. `causal`
    hides the rest of the block; where full and sliding layers are mixed, in the sliding ones only (so speculators and
    DeepSeek-V4 train them).
    """
    start = num_keys - num_inputs  # of the block
    columns = torch.arange(num_keys, device=device)
    rows = columns[start:].unsqueeze(-1)
    masks: dict[str, torch.Tensor | None] = {}
    for layer_type in set(layer_types):
        is_sliding = layer_type == "sliding_attention"
        is_causal = causal and (is_sliding or "sliding_attention" not in layer_types)
        mask = None
        if is_causal or (is_sliding and start > window):
            first = start - window if is_sliding else 0
            last = rows if is_causal else num_keys - 1
            mask = ((columns >= first) & (columns <= last)).expand(num_inputs, -1)[None, None]
        masks[layer_type] = mask
    return masks
