"""flash-attn by its definitions: the package needs a GPU, and transformers' path to it does not."""

import sys
from types import ModuleType

import torch
from transformers import modeling_flash_attention_utils as flash_utils


class FlashAttention:
    """What transformers imports from flash-attn; `calls` counts queries and keys of each call's sequences."""

    def __init__(self):
        self.calls: list[list[tuple[int, int]]] = []

    def install(self, monkeypatch) -> None:
        """Have transformers find this as flash-attn."""
        package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
        package.flash_attn_func, package.flash_attn_varlen_func = self.flash_attn_func, self.flash_attn_varlen_func
        package.flash_attn_with_kvcache = None
        padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
        monkeypatch.setattr(flash_utils, "_loaded_implementation", None)

    def flash_attn_func(self, q, k, v, **settings):
        """[B, S, heads, D]"""
        self.calls.append([(q.shape[1], k.shape[1])] * len(q))
        return torch.stack([_attend(*states, **settings) for states in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,  # [all queries, heads, D]
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ):
        """Sequences one behind the other."""
        lengths = [cumulated.diff().tolist() for cumulated in (cu_seqlens_q, cu_seqlens_k)]
        self.calls.append(list(zip(*lengths, strict=True)))
        states = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        settings = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
        return torch.cat([_attend(*sequence, **settings) for sequence in states])


def _attend(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, dropout_p=0.0):
    """One sequence; the last query stands at the last key, and a window counts keys to the left and to the right."""
    assert dropout_p == 0
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(q)).unsqueeze(-1) + len(k) - len(q) - torch.arange(len(k))
    left, right = window_size
    hidden = (distance < 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance > left) & (left >= 0)
    hidden |= (-distance > right) & (right >= 0)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
