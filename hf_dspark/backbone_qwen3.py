"""The Qwen3 decoder layer of a draft: transformers' modules, with keys and values of the target's context in front."""

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .attention_interface import draft_attention
from .configuration_dspark import DSparkConfig


class DraftAttention(Qwen3Attention):
    """Block queries over [cached context ; new context ; block]."""

    projections_of_one_input = (("k_proj", "v_proj"),)

    def __init__(self, config: DSparkConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False
        self.is_interleaved = config.rope_interleaved
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, g, H]  block, normed
        context: torch.Tensor,  # [B, new, H]  projected features of newly committed positions
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # [B, new+g, head_dim] each
        cache: Cache | None,
        attention_mask: torch.Tensor | None = None,  # [B, 1, g, keys]  True where seen; None: all is
        kv_lengths: torch.Tensor | None = None,  # [B]  keys of each row, the block's included; they replace the mask
    ) -> torch.Tensor:
        batch_size, block_size = hidden_states.shape[:2]
        heads = (batch_size, -1, self.head_dim)
        rows = torch.cat([context, hidden_states], dim=1)
        query = self.q_norm(self.q_proj(hidden_states).view(batch_size, block_size, *heads[1:])).transpose(1, 2)
        key = self.k_norm(self.k_proj(rows).view(batch_size, rows.shape[1], *heads[1:])).transpose(1, 2)
        value = self.v_proj(rows).view(batch_size, rows.shape[1], *heads[1:]).transpose(1, 2)
        cos, sin = position_embeddings
        if self.is_interleaved:  # neighbouring channels become halves, for queries and keys alike
            query, key = _halves(query), _halves(key)
        # Queries and keys are of different lengths: each is rotated alone, with its own positions.
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -block_size:], sin[:, -block_size:])
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        settings = {"dropout": 0.0, "scaling": self.scaling}
        if self.config.attention_sinks:
            settings["s_aux"] = self.sinks
        attend = draft_attention(self.config, attention_mask, kv_lengths, eager_attention_forward)
        output, _ = attend(self, query, key, value, attention_mask, **settings)
        return self.o_proj(output.reshape(batch_size, block_size, -1))


def _halves(heads: torch.Tensor) -> torch.Tensor:
    """Channels [..., 2i] before channels [..., 2i+1]."""
    return torch.cat([heads[..., ::2], heads[..., 1::2]], dim=-1)


class DraftDecoderLayer(GradientCheckpointingLayer):
    """One layer; the context has passed `hidden_norm` already and is not normed again."""

    def __init__(self, config: DSparkConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DraftAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, context, position_embeddings, cache, attention_mask=None, kv_lengths=None):
        """Shapes as in `DraftAttention`; returns the block's hidden states [B, g, H]."""
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(normed, context, position_embeddings, cache, attention_mask, kv_lengths)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Qwen3Backbone:
    """The modules a draft of this backbone is built from."""

    DecoderLayer = DraftDecoderLayer
    RMSNorm = Qwen3RMSNorm
    RotaryEmbedding = Qwen3RotaryEmbedding
