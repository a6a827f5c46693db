"""Step 2, draft: anchor and masks through the backbone once, then the block is sampled left to right (section 2)."""

from collections.abc import Callable

import torch
from transformers import Cache

from .dispatch import with_kernel
from .rollback import drop_last
from .sampling import TemperatureSampler
from .state import Distribution, DraftBlock

# (draft logits [B, V], tokens drafted before [B, k]) -> token ids [B], and the law [B, 1, K] they were drawn from.
# None is for the likeliest token, or the softmax of the logits at a temperature that the caller knows.
Sampler = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, Distribution | None]]


def draft_block(
    draft,
    features: torch.Tensor,  # [B, new, m*H]  of the positions committed since the last call
    anchor_ids: torch.Tensor,  # [B]
    cache: Cache,  # draft.new_cache(); holds the context read before
    *,
    position_ids: torch.Tensor | None = None,  # [B, new+inputs]  of the new context, then of the block's inputs
    num_tokens: int | None = None,
    sampler: Sampler | None = None,
    attention_mask: dict[str, torch.Tensor] | None = None,
    kv_lengths: torch.Tensor | None = None,
    forward: Callable[..., torch.Tensor] | None = None,
) -> DraftBlock:
    """Propose up to `block_size` tokens after the anchor; the context is read into `cache`, the block is not kept.

    Args:
        position_ids: default is a context without gaps, so the anchor stands at its length.
        num_tokens: sample only the first of the block's positions. The backbone always sees the whole block.
        sampler: default is greedy.
        attention_mask, kv_lengths: as the draft's forward takes them.
        forward: default is the draft's own.

    Raises ValueError where the draft has no embedding or lm_head of its own and no target is bound.
    """
    config = draft.config
    num_inputs = config.num_block_inputs
    num_tokens = config.block_size if num_tokens is None else num_tokens
    anchor_ids = anchor_ids.reshape(-1, 1)
    masks = torch.full_like(anchor_ids, config.mask_token_id).expand(-1, num_inputs - 1)
    if position_ids is None:
        start = cache.get_seq_length()
        stop = start + features.shape[1] + num_inputs
        position_ids = torch.arange(start, stop, device=features.device).expand(features.shape[0], -1)
    block_ids = torch.cat([anchor_ids, masks], dim=1)
    lengths = {} if kv_lengths is None else {"kv_lengths": kv_lengths}
    hidden_states = (forward or draft)(features, block_ids, position_ids, cache, attention_mask, **lengths)
    drop_last(cache, num_inputs)
    # Contiguous, or matmul copies lm_head's weight for each row of the batch.
    hidden_states = hidden_states[:, config.first_slot : config.first_slot + num_tokens].contiguous()
    base_logits = draft.compute_logits(hidden_states)
    anchor_ids = anchor_ids.to(base_logits.device)
    sampler = TemperatureSampler() if sampler is None else sampler
    token_ids, draft_logits, law = sample_block(base_logits, anchor_ids, hidden_states, draft, sampler)
    confidence = None
    if draft.confidence_head is not None:
        previous = None
        if config.confidence_head_with_markov:
            previous = draft.markov_head.previous_embedding(torch.cat([anchor_ids, token_ids[:, :-1]], dim=1))
        confidence = draft.confidence_head(hidden_states, previous)
    return DraftBlock(
        token_ids=token_ids,
        base_logits=base_logits,
        draft_logits=draft_logits,
        confidence_logits=confidence,
        hidden_states=hidden_states,
        distribution=law,
        confidence_temperatures=config.confidence_temperatures,
    )


@with_kernel
def sample_block(
    base_logits: torch.Tensor,  # [B, g, V]  of the draft's tokens
    anchor_ids: torch.Tensor,  # [B, 1]
    hidden_states: torch.Tensor,  # [B, g, H]
    draft,
    sampler: Sampler,
) -> tuple[torch.Tensor, torch.Tensor, Distribution | None]:
    """The sequential stage: each sampled token feeds the next position's bias.

    Returns token ids [B, g], the logits [B, g, V] they were sampled from, and their law where the sampler gives one.
    """
    head, state = draft.markov_head, None
    tokens = anchor_ids  # [B, 1+k]
    draft_logits, laws = [], []
    for k in range(base_logits.shape[1]):
        logits = base_logits[:, k]
        if head is not None:
            bias, state = head(tokens[:, -1], hidden_states[:, k], state)
            logits = logits + bias.float()
        logits = draft.to_target_vocabulary(logits)
        next_ids, law = sampler(logits, tokens[:, 1:])
        tokens = torch.cat([tokens, next_ids.to(tokens.device).unsqueeze(-1)], dim=1)
        draft_logits.append(logits)
        laws.append(law)
    return tokens[:, 1:], torch.stack(draft_logits, dim=1), join_laws(laws)


def join_laws(laws: list[Distribution | None]) -> Distribution | None:
    """Laws of single positions as one of all of them."""
    if laws[0] is None:
        return None
    ids = None if laws[0].support_ids is None else torch.cat([law.support_ids for law in laws], dim=1)
    return Distribution(torch.cat([law.probs for law in laws], dim=1), ids)
