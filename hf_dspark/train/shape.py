"""The shape of a new draft: inherited from its target, changed by flags."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_dspark import DSparkConfig
from ..features import num_target_layers
from .answers import Sample


def spread_taps(num_layers: int, count: int) -> list[int]:
    """`count` layer ids spread evenly from the second layer to the third from the end, as in the released drafts."""
    last = max(num_layers - 3, 1)
    first = min(1, last)
    if count == 1:
        return [last]
    return sorted({round(first + i * (last - first) / (count - 1)) for i in range(count)})


def frequent_tokens(samples: Sequence[Sample], count: int, vocab_size: int) -> torch.Tensor:
    """Ids [count], rising, of the tokens that the answers of `samples` hold most often."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for sample in samples:
        for start, stop in sample.answer_spans:
            counts += torch.tensor(sample.input_ids[start:stop]).bincount(minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:count].sort().values


def draft_config(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    layers: int = 2,
    block_size: int = 7,
    markov_rank: int = 64,
    head: str = "vanilla",
    num_taps: int = 5,
    taps: list[int] | None = None,
    mask_token_id: int | None = None,
    confidence: bool = True,
    draft_vocab_size: int | None = None,
) -> DSparkConfig:
    """A draft for `target`: heads, widths and rope are the target's; sizes of the draft are the arguments."""
    theirs = target.config.get_text_config(decoder=True)
    rope = theirs.rope_parameters
    # The draft rotates whole heads, at the target's frequencies.
    rope = {k: v for k, v in rope.get("full_attention", rope).items() if k != "partial_rotary_factor"}
    has_head = markov_rank > 0
    return DSparkConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=getattr(theirs, "intermediate_size", None) or 3 * theirs.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=theirs.num_attention_heads,
        num_key_value_heads=getattr(theirs, "num_key_value_heads", None) or theirs.num_attention_heads,
        head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        rms_norm_eps=getattr(theirs, "rms_norm_eps", 1e-6),
        max_position_embeddings=theirs.max_position_embeddings,
        rope_parameters=rope,
        block_size=block_size,
        target_layer_ids=taps or spread_taps(num_target_layers(target), num_taps),
        num_target_layers=num_target_layers(target),
        mask_token_id=mask_token_id if mask_token_id is not None else _mask_token(tokenizer),
        draft_vocab_size=draft_vocab_size,
        markov_rank=markov_rank,
        markov_head_type=head,
        enable_confidence_head=confidence,
        confidence_head_with_markov=confidence and has_head,
    )


def _mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token that text does not hold: the tokenizer's mask token, else a special one that nothing else uses."""
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template or ""
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and token_id not in used and token.content not in template:
            return token_id
    raise ValueError(
        "The tokenizer has no mask token and no special token that is not used otherwise. Name a token that never "
        "occurs in text with `mask_token_id`."
    )
