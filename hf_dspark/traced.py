"""A round over rows of slot caches as two functions of tensors: what `compiled.py` makes graphs of.

Nothing in them depends on the host but shapes: random numbers, limits and the numbers of a sampling rule are
arguments, and what the next round begins with is written in place. The first serves eager rounds, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .accept import choose_by
from .attention_interface import NAME as BLOCK_ATTENTION
from .compat import CACHE
from .draft import Sampler, draft_block
from .features import FeatureTap
from .layerwise import part
from .rows import Columns, up_to_eos
from .slots import PADDING, READ_SLOT_MASKS, SlotCache, draft_slot_masks, reads_by_masks, slot_masks
from .state import Choice, DraftBlock
from .warpers import Warpers


@dataclass(frozen=True, slots=True)
class Frame:
    """What is kept on the device between the rounds of a call whose R rows all stay."""

    columns: Columns
    tap: FeatureTap  # of any call: none that needs hooks has a frame
    features: torch.Tensor  # [R, L+1, m*H]  of tokens that the draft has not read
    slots: torch.Tensor  # [R, L+1]  theirs; PADDING where a token did not stay
    ended: torch.Tensor  # [R]  rows that say nothing more


def draft_frame(
    draft: PreTrainedModel,
    cache: SlotCache,
    frame: Frame,
    starts: torch.Tensor,  # [R]  slots where contexts begin
    *,
    num_tokens: int,
    sampler: Sampler,
    is_whole: bool,
) -> DraftBlock:
    """`draft_rows` for all rows of a frame, over all slots of a static cache."""
    own = (slice(0, len(starts)), starts, frame.features, frame.slots)
    settings = {"num_tokens": num_tokens, "sampler": sampler, "is_whole": is_whole}
    return draft_rows(draft, frame.columns, cache, *own, stop=cache.num_slots, **settings)


def draft_rows(
    draft: PreTrainedModel,
    columns: Columns,
    cache: SlotCache,
    own: slice,  # the rows' places
    starts: torch.Tensor,  # [R]  slots where their contexts begin
    features: torch.Tensor,  # [R, w, m*H]  of tokens the draft has not read
    slots: torch.Tensor,  # [R, w]
    *,
    stop: int,
    num_tokens: int,
    sampler: Sampler | None,
    forward=None,
    is_single: bool = False,
    is_whole: bool = False,
) -> DraftBlock:
    """A block for each row, whose new context goes to its slots in the draft's cache; slots before `stop` are read.

    `is_single`: it is one row, whose features and block lie side by side up to `stop`. `is_whole`: contexts begin with
    the first token.
    """
    place = {"stop": stop, "is_single": is_single, "is_whole": is_whole}
    anchor_ids, position_ids, seen = _place_blocks(draft, columns, cache, own, starts, slots, **place)
    return draft_block(
        draft,
        features.to(draft.device),
        anchor_ids,
        cache,
        position_ids=position_ids,
        num_tokens=num_tokens,
        sampler=sampler,
        forward=forward,
        **seen,
    )


@part
def _place_blocks(
    draft: PreTrainedModel,
    columns: Columns,
    cache: SlotCache,
    own: slice,
    starts: torch.Tensor,
    slots: torch.Tensor,
    *,
    stop: int,
    is_single: bool,
    is_whole: bool,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Anchors [R] and positions [R, w+g] of the next forward, which is placed, and by which arguments it sees."""
    anchor_slots = columns.anchor_slots(own)
    inputs = anchor_slots.unsqueeze(-1) + torch.arange(draft.config.num_block_inputs, device=anchor_slots.device)
    all_slots = torch.cat([slots, inputs], dim=1)
    cache.place(all_slots, stop, first_row=own.start, start=stop - all_slots.shape[1] if is_single else None)
    seen = {}
    if not (is_single and is_whole and cache.stop == stop):  # else it is as behind a cache of the draft's own
        seen = _what_drafts_see(draft, cache, inputs, starts, is_whole=is_whole)
    positions = columns.positions(all_slots, inputs[:, -1], own)
    return columns.anchors(own).to(draft.device), positions.to(draft.device), seen


def _what_drafts_see(
    draft: PreTrainedModel, cache: SlotCache, inputs: torch.Tensor, starts: torch.Tensor, *, is_whole: bool
) -> dict[str, Any]:
    """Arguments by which blocks in slots `inputs` [R, g] attend to all slots from `starts` [R] to their ends."""
    config, device = draft.config, draft.device
    if is_whole and not reads_by_masks(device) and "sliding_attention" not in config.layer_types:
        return {"kv_lengths": (inputs[:, -1] + 1).to(device)}
    settings = {"causal": config.causal, "window": config.sliding_window}
    shape = (config.num_block_inputs, cache.stop, config.layer_types)
    masks = draft_slot_masks(inputs[:, 0], starts, *shape, **settings)
    return {"attention_mask": {name: mask.to(device) for name, mask in masks.items()}}


def verify_rows(
    target: PreTrainedModel,
    cache: SlotCache,
    frame: Frame,
    draft_ids: torch.Tensor,  # [R, L]
    draft_probs: torch.Tensor | None,  # [R, L, V]  the law they were drawn from; None: greedy
    warpers: Warpers | None,
    chances: tuple[torch.Tensor | None, torch.Tensor | None],  # uniforms [R, L], exponentials [R, V]
    limits: torch.Tensor | None,  # [R]  drafted tokens that are considered; None: all
    eos_ids: torch.Tensor | None,
    arguments: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Verify, accept, commit: tokens [R, L+1], and [3, R] how many are emitted and were accepted, and which rows end.

    `arguments` are more of the target's. Tokens, their features and the rows that ended are written to the frame.
    """
    slots, placed = _place_tokens(target, cache, frame.columns, draft_ids)
    outputs = target(**arguments, **placed, **{CACHE: cache}, use_cache=True, return_dict=True)
    logits = outputs.logits if warpers is None else outputs.logits.float()
    choice = choose_by(warpers, logits, draft_ids, draft_probs, *chances, limits)
    return choice.token_ids, _commit(frame, choice, slots, frame.tap.take(outputs), eos_ids)


@part
def _place_tokens(
    target: PreTrainedModel, cache: SlotCache, columns: Columns, draft_ids: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Slots [R, L+1] of the anchors and the drafted tokens, which are placed, and the forward's arguments for them."""
    own = slice(0, len(draft_ids))
    offsets = torch.arange(draft_ids.shape[1] + 1, device=draft_ids.device)
    slots = columns.anchor_slots(own).unsqueeze(-1) + offsets
    cache.place(slots, cache.num_slots)
    tokens = torch.cat([columns.anchors(own).unsqueeze(-1), draft_ids], dim=1)
    positions = columns.positions(slots, columns.last_slots[own], own)
    return slots, {"input_ids": tokens, "position_ids": positions, **attention_to_slots(target, cache, slots)}


@part
def _commit(
    frame: Frame, choice: Choice, slots: torch.Tensor, features: torch.Tensor, eos_ids: torch.Tensor | None
) -> torch.Tensor:
    """What `verify_rows` says of the rows, [3, R]; the frame is as the next round finds it."""
    columns, own = frame.columns, slice(0, len(slots))
    counts, at_eos = up_to_eos(choice, eos_ids)
    room = columns.last_slots[own] + 1 - slots[:, 0]
    finished = frame.ended | at_eos | (counts >= room)
    counts = counts.minimum(room).masked_fill(frame.ended, 0)
    offsets = torch.arange(slots.shape[1], device=slots.device)
    frame.features.copy_(features)
    frame.slots.copy_(torch.where(offsets < counts.unsqueeze(-1), slots, PADDING))
    frame.ended.copy_(finished)
    columns.write(own, choice.token_ids, counts)
    return torch.stack([counts, choice.num_accepted, finished.long()])


def attention_to_slots(target: PreTrainedModel, cache: SlotCache, slots: torch.Tensor) -> dict[str, Any]:
    """What tells the target's attention which slots are seen by tokens in `slots` [R, T]."""
    implementation = target.get_decoder().config._attn_implementation
    # Not all models hand a window on.
    if implementation == BLOCK_ATTENTION and not reads_by_masks(slots.device) and not any(cache.windows):
        if cache.num_placed == 1 and not cache.is_static:  # the slots that are read end with the block
            return {"attention_mask": None}
        # Any mask of four axes keeps the model from making one of its own.
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=slots.device)
        return {"attention_mask": no_mask, "kv_lengths": slots[:, -1] + 1}
    if implementation not in READ_SLOT_MASKS:  # the model makes of padding what they read
        return {"attention_mask": cache.pad_rows(slots[:, -1] + 1)}
    dtype = target.dtype if implementation == "eager" else None
    return {"attention_mask": slot_masks(slots, cache.stop, cache.windows, dtype=dtype)}
