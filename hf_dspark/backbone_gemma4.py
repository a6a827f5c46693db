"""The Gemma4 decoder layer of a draft: transformers' modules, with keys and values of the target's context in front.

Values are normed, attention logits are not scaled, each half of the layer is normed before and after, and the layer's
output has a scalar. Drafts have full-attention layers only.
"""

import torch
from transformers import Cache, Gemma4TextConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextAttention,
    Gemma4TextMLP,
    Gemma4TextRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .attention_interface import draft_attention
from .configuration_dspark import DSparkConfig

_FULL = "full_attention"


def _theirs(config: DSparkConfig) -> Gemma4TextConfig:
    """The draft's layers as Gemma4's own modules want to be told of them."""
    return Gemma4TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        global_head_dim=config.head_dim,
        num_global_key_value_heads=config.num_key_value_heads,
        attention_k_eq_v=bool((config.backbone_config or {}).get("attention_k_eq_v")),
        hidden_activation=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=config.attention_bias,
        max_position_embeddings=config.max_position_embeddings,
        layer_types=[_FULL] * config.num_hidden_layers,
        rope_parameters={_FULL: dict(config.rope_parameters), "sliding_attention": dict(config.rope_parameters)},
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        enable_moe_block=False,
        use_double_wide_mlp=False,
    )


class DraftAttention(Gemma4TextAttention):
    """Block queries over [cached context ; new context ; block]."""

    def __init__(self, config: DSparkConfig, layer_idx: int):
        super().__init__(_theirs(config), layer_idx)
        self.is_causal = False
        self.config = config  # which knows the attention that is asked for

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
        rows = torch.cat([context, hidden_states], dim=1)
        cos, sin = position_embeddings
        query = self.q_norm(self.q_proj(hidden_states).view(batch_size, block_size, -1, self.head_dim))
        query = apply_rotary_pos_emb(query, cos[:, -block_size:], sin[:, -block_size:], unsqueeze_dim=2)
        key = self.k_proj(rows).view(batch_size, rows.shape[1], -1, self.head_dim)
        value = key if self.v_proj is None else self.v_proj(rows).view_as(key)
        key = apply_rotary_pos_emb(self.k_norm(key), cos, sin, unsqueeze_dim=2).transpose(1, 2)
        value = self.v_norm(value).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = draft_attention(self.config, attention_mask, kv_lengths, eager_attention_forward)
        output, _ = attend(self, query.transpose(1, 2), key, value, attention_mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(output.reshape(batch_size, block_size, -1))


class DraftDecoderLayer(GradientCheckpointingLayer):
    """One layer; the context has passed `hidden_norm` already and is not normed again."""

    def __init__(self, config: DSparkConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DraftAttention(config, layer_idx)
        self.mlp = Gemma4TextMLP(_theirs(config), layer_idx)
        self.input_layernorm = Gemma4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Gemma4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = Gemma4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = Gemma4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, hidden_states, context, position_embeddings, cache, attention_mask=None, kv_lengths=None):
        """Shapes as in `DraftAttention`; returns the block's hidden states [B, g, H]."""
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(normed, context, position_embeddings, cache, attention_mask, kv_lengths)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        widened = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return (hidden_states + self.post_feedforward_layernorm(widened)) * self.layer_scalar


class RotaryEmbedding(Gemma4TextRotaryEmbedding):
    """Cosines and sines of full-attention layers."""

    def __init__(self, config: DSparkConfig):
        super().__init__(_theirs(config))
        self.draft_config = config

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(hidden_states, position_ids, _FULL)


class Gemma4Backbone:
    """The modules a draft of this backbone is built from."""

    DecoderLayer = DraftDecoderLayer
    RMSNorm = Gemma4RMSNorm
    RotaryEmbedding = RotaryEmbedding
