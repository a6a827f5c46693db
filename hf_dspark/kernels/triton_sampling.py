"""The sequential stage of a draft whose bias depends on the previous token alone: two launches a token.

The first adds the bias W2 · W1[x_{k-1}] to the base logits tile by tile, stores the sum and keeps each tile's largest
logit and its mass; the second finds the tile that holds the token, and the token in it. Nothing else is V wide.
"""

import torch
import triton
import triton.language as tl
from torch import nn

from .launch import FUSION
from .triton_search import find_share

BLOCK_B, BLOCK_V = 16, 256
BLOCK_BYTES = 128  # of a row of W2, read at once
OPTIONS = {"num_warps": 8, "num_stages": 3, **FUSION}
# Columns behind which the second launch's list of tiles would be longer than a program holds.
MAX_VOCAB = BLOCK_V * 8192
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_sample_block(base_logits, anchor_ids, hidden_states, draft, sampler) -> str | None:
    """The reason why `sample_block` cannot serve; None where it can."""
    head = draft.markov_head
    if torch.compiler.is_compiling():
        return "it is traced"
    if not hasattr(sampler, "temperature"):
        return "logits processors other than a temperature have a say"
    if head is None or head.reads_hidden_states:
        return f"the draft has {'no sequential' if head is None else 'another'} head than `vanilla`"
    if type(head.markov_w1) is not nn.Embedding or type(head.markov_w2) is not nn.Linear:
        return "the head's weights are quantised or adapted"
    weights = (head.markov_w1.weight, head.markov_w2.weight)
    devices = {tensor.device for tensor in (base_logits, anchor_ids, *weights)}
    if len(devices) > 1 or any(hasattr(weight, "to_local") for weight in weights):
        return "the head's weights are offloaded or sharded"
    dtypes = {weight.dtype for weight in weights}
    if base_logits.dtype != torch.float32 or len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"weights of {' and '.join(map(str, dtypes))} on logits of {base_logits.dtype}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (base_logits, *weights)):
        return "a gradient is asked for"
    if base_logits.shape[-1] > MAX_VOCAB:
        return f"a vocabulary of more than {MAX_VOCAB} tokens"
    return None


def sample_block(base_logits, anchor_ids, hidden_states, draft, sampler):
    """Twin of `draft.sample_block`; the law is the softmax of the logits, so none is given."""
    w1, w2 = draft.markov_head.markov_w1.weight, draft.markov_head.markov_w2.weight
    base_logits, ids = base_logits.contiguous(), draft.draft_token_ids
    num_rows, num_tokens, num_columns = base_logits.shape
    num_tiles = triton.cdiv(num_columns, BLOCK_V)
    draft_logits = base_logits.new_empty(num_rows, num_tokens, draft.config.vocab_size)
    if ids is not None:
        ids = ids.to(base_logits.device)
        draft_logits.fill_(-torch.inf)
    uniforms = None if sampler.uniforms is None else sampler.uniforms.to(base_logits.device).contiguous()
    tokens = anchor_ids.new_empty(num_rows, num_tokens + 1)
    tokens[:, :1] = anchor_ids
    largest = base_logits.new_empty(num_rows, num_tiles)
    masses = torch.empty_like(largest, dtype=torch.float64)
    arguments = (draft_logits, ids, largest, masses, tokens, float(sampler.temperature))
    sizes = (num_rows, num_tokens, num_columns, draft_logits.shape[-1])
    rank, read = w2.shape[1], BLOCK_BYTES // w2.element_size()
    adding = {"RANK": rank, "BLOCK_R": read, "BLOCK_B": BLOCK_B, "BLOCK_V": BLOCK_V, **OPTIONS}
    choosing = {"BLOCK_TILES": triton.next_power_of_2(num_tiles), "BLOCK_V": BLOCK_V, **OPTIONS}
    # Rows first: programs that share a tile of W2 run side by side.
    grid = (triton.cdiv(num_rows, BLOCK_B), num_tiles)
    with torch.cuda.device_of(base_logits):
        for k in range(num_tokens):
            add_bias_kernel[grid](base_logits, w1.contiguous(), w2.contiguous(), *arguments, k, *sizes, **adding)
            choose_kernel[num_rows,](uniforms, *arguments, k, *sizes[1:], **choosing)
    return tokens[:, 1:], draft_logits, None


@triton.jit(do_not_specialize=["position", "num_rows", "num_tokens"])
def add_bias_kernel(
    base_logits,  # [B, g, V]  fp32
    w1,  # [tokens, RANK]
    w2,  # [V, RANK]
    draft_logits,  # [B, g, num_tokens of the target]  fp32, written
    token_ids,  # [V]  the target's ids of the columns; None: the same
    largest,  # [B, tiles]  fp32, written
    masses,  # [B, tiles]  fp64, written
    tokens,  # [B, 1+g]
    temperature,
    position,
    num_rows,
    num_tokens,
    num_columns,
    num_target_columns,
    RANK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    tile = tl.program_id(1)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    is_row, is_column = rows < num_rows, columns < num_columns
    is_entry = is_row[:, None] & is_column[None, :]
    previous = tl.load(tokens + rows * (num_tokens + 1) + position, mask=is_row, other=0)
    bias = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for start in range(0, RANK, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        is_rank = ranks < RANK
        latent_mask, weight_mask = is_row[:, None] & is_rank[None, :], is_rank[:, None] & is_column[None, :]
        latent = tl.load(w1 + previous[:, None] * RANK + ranks[None, :], mask=latent_mask, other=0.0)
        weight = tl.load(w2 + columns[None, :] * RANK + ranks[:, None], mask=weight_mask, other=0.0)
        bias = tl.dot(latent, weight, bias, input_precision="ieee")
    line = rows.to(tl.int64) * num_tokens + position
    base = tl.load(base_logits + line[:, None] * num_columns + columns[None, :], mask=is_entry, other=0.0)
    # Rounded as the head rounds its output.
    logits = base + bias.to(w2.dtype.element_ty).to(tl.float32)
    stored_at = columns
    if token_ids is not None:
        stored_at = tl.load(token_ids + columns, mask=is_column, other=0)
    tl.store(draft_logits + line[:, None] * num_target_columns + stored_at[None, :], logits, mask=is_entry)
    logits = tl.where(is_column[None, :], logits, -float("inf"))
    top = tl.max(logits, 1)
    mass = tl.sum(tl.exp((logits - top[:, None]) / temperature).to(tl.float64), 1)
    summary = rows * tl.num_programs(1) + tile
    tl.store(largest + summary, top, mask=is_row)
    tl.store(masses + summary, mass, mask=is_row)


@triton.jit(do_not_specialize=["position", "num_tokens"])
def choose_kernel(
    uniforms,  # [B, g]  fp64; None: the likeliest
    draft_logits,
    token_ids,
    largest,
    masses,
    tokens,  # column `position` + 1 is written
    temperature,
    position,
    num_tokens,
    num_columns,
    num_target_columns,
    BLOCK_TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    num_tiles = tl.cdiv(num_columns, BLOCK_V)
    tiles = tl.arange(0, BLOCK_TILES)
    is_tile = tiles < num_tiles
    tops = tl.load(largest + row * num_tiles + tiles, mask=is_tile, other=-float("inf"))
    top = tl.max(tops, 0)
    line = row.to(tl.int64) * num_tokens + position
    if uniforms is None:
        tile = tl.argmax(tops, 0)
    else:
        mass = tl.load(masses + row * num_tiles + tiles, mask=is_tile, other=0.0)
        mass *= tl.exp((tops - top) / temperature).to(tl.float64)
        share = tl.load(uniforms + line) * tl.sum(mass, 0)
        tile, before = find_share(mass, share, BLOCK_TILES)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    is_column = columns < num_columns
    stored_at = columns
    if token_ids is not None:
        stored_at = tl.load(token_ids + columns, mask=is_column, other=0)
    stored_at = line * num_target_columns + stored_at
    logits = tl.load(draft_logits + stored_at, mask=is_column, other=-float("inf"))
    if uniforms is None:
        column = tl.argmax(logits, 0)
    else:
        column, _ = find_share(tl.exp((logits - top) / temperature).to(tl.float64), share - before, BLOCK_V)
    token = (tile * BLOCK_V + column).to(tl.int64)
    if token_ids is not None:
        token = tl.load(token_ids + token)
    tl.store(tokens + row * (num_tokens + 1) + position + 1, token)
