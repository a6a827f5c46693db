"""How target and draft come to call `block_attention`: by transformers' AttentionInterface, under the name "dspark".

The loop switches them over for the length of a call (`block_attention_on`); a user may name it as
`attn_implementation`, too.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import block_attention, visible_keys
from .dispatch import note
from .model_state import modules_of
from .packing import Packing

NAME = "dspark"
MAX_BLOCK = 64  # rows; longer inputs are prompts, which are sdpa's


def dspark_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, L, D], or packed [1, H, T, D]
    key: torch.Tensor,  # [B, Hkv, S, D]
    value: torch.Tensor,  # [B, Hkv, S, Dv]
    attention_mask: torch.Tensor | None,
    *args,
    packing: Packing | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`block_attention` as models call it, [B, L, H, Dv]. Prompts and training go to sdpa where it can serve.

    With `packing`, queries come and outputs go packed [1, T, H, Dv]; keys, values and mask are those of rows.
    """
    if packing is None:
        return _attend(module, query, key, value, attention_mask, *args, **kwargs)
    query = packing.unpack(query.transpose(1, 2)).transpose(1, 2)
    output, weights = _attend(module, query, key, value, attention_mask, *args, **kwargs)
    return packing.pack(output), weights


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,  # [B]  keys of each row, in slots 0, 1, ...; they replace the mask
    **kwargs,
) -> tuple[torch.Tensor, None]:
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_sdpas = softcap is None and s_aux is None and kv_lengths is None
    if dropout > 0 or kwargs.get("position_bias") is not None or (is_sdpas and not _is_block(query, key)):
        if not is_sdpas:
            raise ValueError(
                f"{type(module).__name__} asks `attn_implementation='dspark'` for dropout or a position bias together "
                "with a soft-cap, sinks or a batch in slots. Load the model with `attn_implementation='eager'`."
            )
        settings = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
        return _attend_by_sdpa(module, query, key, value, attention_mask, **settings, **kwargs)
    window = sliding_window if kv_lengths is not None else None
    if sliding_window is not None and getattr(attention_mask, "block_window", None) == sliding_window:
        attention_mask, window = None, sliding_window
    output = block_attention(
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=is_causal,
        lengths=kv_lengths,
        mask=attention_mask if kv_lengths is None else None,
        window=window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output.transpose(1, 2).contiguous(), None


def draft_attention(
    config, attention_mask: torch.Tensor | None, kv_lengths: torch.Tensor | None, eager: Callable
) -> Callable:
    """What a draft's layer attends by: the attention its user chose, where it reads what says which keys are seen.

    A draft's mask [B, 1, g, keys] is True where seen; eager would add it to the scores, flash attention takes none.
    Sinks most others leave out.
    """
    if kv_lengths is not None:
        return functools.partial(dspark_attention, is_causal=config.causal, kv_lengths=kv_lengths)
    implementation, attend = config._attn_implementation, dspark_attention
    if not config.attention_sinks and (attention_mask is None or implementation in ("sdpa", NAME)):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return functools.partial(attend, is_causal=False)


def _is_block(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether these are a few queries behind other keys, or a single one; otherwise they are a prompt."""
    num_rows = query.shape[2]
    return num_rows == 1 or (num_rows < key.shape[2] and num_rows <= MAX_BLOCK)


def _attend_by_sdpa(module, query, key, value, attention_mask, *, is_causal: bool, **kwargs):
    if attention_mask is None and is_causal and 1 < query.shape[2] < key.shape[2]:
        attention_mask = visible_keys(query, key, is_causal=True)  # sdpa's own would end at the upper left
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)


def block_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,  # [B, n]  False where padded
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> torch.Tensor | None:
    """sdpa's mask as transformers' models ask for it; none for a block behind other keys, without padding.

    None means then: causal, and the keys end with the block. A mask that only a window makes necessary says so in its
    attribute `block_window`.
    """
    arguments = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "local_size": local_size}
    arguments |= {"q_offset": q_offset, "kv_offset": kv_offset, "attention_mask": attention_mask, **kwargs}
    # In a static cache the offset is a tensor, and there are slots behind the block.
    is_at_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if q_length == 1 or (is_at_end and q_offset == 0):
        return sdpa_mask(**arguments, allow_is_causal_skip=allow_is_causal_skip)
    is_plain = is_at_end and allow_is_causal_skip and q_length <= MAX_BLOCK and _is_unpadded(attention_mask)
    if is_plain and (local_size is None or q_offset + q_length <= local_size):
        return None
    mask = sdpa_mask(**arguments, allow_is_causal_skip=False)
    if is_plain and not torch.compiler.is_compiling():
        mask.block_window = local_size
    return mask


_call = threading.local()  # what this thread's speculative call found out


def _is_unpadded(attention_mask: torch.Tensor | None) -> bool:
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling():
        return False
    # A synchronisation, unless a speculative call is on, which made it once.
    return getattr(_call, "is_unpadded", False) or bool(attention_mask.all())


ALL_ATTENTION_FUNCTIONS.register(NAME, dspark_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, block_mask)

_lock = threading.Lock()
_switched: dict[int, int] = {}  # id of a config that is switched over -> number of calls that use it


@contextmanager
def block_attention_on(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    *,
    attention_mask: torch.Tensor | None,  # [B, n]  of the call
    output_attentions: bool,
) -> Iterator[None]:
    """Target and draft attend by `block_attention` while this is open, where their layers allow it."""
    reason = "attention weights are asked for" if output_attentions else why_not_switched(target)
    if reason is not None:
        note("block_attention", f"the target keeps its own: {reason}")
    _call.is_unpadded = attention_mask is None or bool(attention_mask.all())
    with _lock:
        configs = _switchable_configs(draft) if reason is not None else _switchable_configs(target, draft)
        for config in configs:
            _switched[id(config)] = _switched.get(id(config), 0) + 1
            config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        _call.is_unpadded = False
        with _lock:
            for config in configs:
                _switched[id(config)] -= 1
                if not _switched[id(config)]:  # the last of several calls at the same time
                    del _switched[id(config)]
                    config._attn_implementation_internal = "sdpa"


def why_not_switched(target: PreTrainedModel) -> str | None:
    """Why a target's attention is left as the user has it; None where `block_attention_on` takes it over."""
    decoder = target.get_decoder()
    implementation = decoder.config._attn_implementation
    if implementation != NAME and implementation != "sdpa":
        return f"its `attn_implementation` is {implementation!r}, not 'sdpa'"
    if not decoder._can_set_attn_implementation():
        return f"{type(decoder).__name__} does not take its attention from transformers' AttentionInterface"
    # Without them sdpa computes something else than the model means, and so does plain generate().
    has_sinks = any("sinks" in module._parameters for module in modules_of(decoder))
    if implementation == "sdpa" and (has_sinks or getattr(decoder.config, "attn_logit_softcapping", None)):
        return "sdpa leaves out its sinks or soft-cap"
    return None


def _switchable_configs(*models: PreTrainedModel) -> list:
    """The configs that the decoders' modules read their attention from."""
    decoders = [model.get_decoder() for model in models]
    found = {id(m.config): m.config for m in modules_of(*decoders) if "config" in vars(m)}
    switched = [config for key, config in found.items() if key in _switched]
    return switched + [c for c in found.values() if getattr(c, "_attn_implementation", None) == "sdpa"]
