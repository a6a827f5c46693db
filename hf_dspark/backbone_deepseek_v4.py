"""The DeepSeek-V4 decoder layer of a draft: transformers' modules, with the target's context in front of the block.

Several residual streams mixed by hyper-connections, one vector per position that is key and value of all heads,
attention sinks, rope undone on the output, routed experts. These may stay packed fp4, dequantised where they are hit.
"""

import torch
from torch import nn
from transformers import Cache, DeepseekV4Config
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4DecoderLayer,
    DeepseekV4Experts,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_dspark import DEEPSEEK_V4_FIELDS, DSparkConfig
from .dequantize import FP4_GROUP, dequantize_fp4


def _theirs(config: DSparkConfig) -> DeepseekV4Config:
    """The draft's layers as DeepSeek-V4's own modules want to be told of them: window only, routed by scores."""
    own = {name: config.backbone_config[name] for name in DEEPSEEK_V4_FIELDS if name != "experts"}
    theirs = DeepseekV4Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_act=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_parameters["rope_theta"],
        partial_rotary_factor=config.rope_parameters["partial_rotary_factor"],
        sliding_window=config.sliding_window,
        layer_types=["sliding_attention"] * config.num_hidden_layers,
        mlp_layer_types=["moe"] * config.num_hidden_layers,
        **own,
    )
    theirs._experts_implementation = "eager"  # few rows, many experts: the others gather or sort all weights
    return theirs


class DraftAttention(DeepseekV4Attention):
    """Block queries over [cached context ; new context ; block]."""

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, g, H]  block, normed
        context: torch.Tensor,  # [B, new, H]  projected features of newly committed positions
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # [B, new+g, rope_dim/2] each
        cache: Cache | None,
        attention_mask: torch.Tensor | None = None,  # [B, 1, g, keys]  True where seen; None: all is
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        batch_size, block_size = hidden_states.shape[:2]
        cos, sin = position_embeddings
        block = cos[:, -block_size:], sin[:, -block_size:]
        query = self.q_b_proj(self.q_a_norm(self.q_a_proj(hidden_states)))
        query = self.q_b_norm(query.view(batch_size, block_size, -1, self.head_dim).transpose(1, 2))
        query = apply_rotary_pos_emb(query, *block)
        rows = torch.cat([context, hidden_states], dim=1)
        keys = apply_rotary_pos_emb(self.kv_norm(self.kv_proj(rows)).unsqueeze(1), cos, sin)
        if cache is not None:
            keys, _ = cache.update(keys, keys, self.layer_idx)
        if attention_mask is not None:
            hidden = torch.finfo(query.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, hidden)
        # Keys are values, so values carry rope, too: it is undone at the query's position.
        output, _ = eager_attention_forward(self, query, keys, keys, attention_mask, scaling=self.scaling)
        output = apply_rotary_pos_emb(output.transpose(1, 2), block[0], -block[1]).transpose(1, 2)
        grouped = output.reshape(batch_size, block_size, self.config.o_groups, -1)
        return self.o_b_proj(self.o_a_proj(grouped).flatten(2)), None


class PackedExperts(nn.Module):
    """Routed experts as fp4 codes and scales; those that a block hits are dequantised for it."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        count, width, hidden_size = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.act_fn = ACT2FN[config.hidden_act]
        self.limit = config.swiglu_limit
        for name, rows, columns in (("gate_up", 2 * width, hidden_size), ("down", hidden_size, width)):
            codes = torch.zeros(count, rows, columns // 2, dtype=torch.uint8)
            scales = torch.full((count, rows, columns // FP4_GROUP), 127, dtype=torch.uint8)  # 2^0
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scales", scales)

    _apply_gate = DeepseekV4Experts._apply_gate

    def forward(
        self,
        hidden_states: torch.Tensor,  # [rows, H]
        top_k_index: torch.Tensor,  # [rows, K]
        top_k_weights: torch.Tensor,  # [rows, K]
    ) -> torch.Tensor:
        """Weighted sum [rows, H] of each row's experts."""
        output = torch.zeros_like(hidden_states)
        # The host must know which experts are hit: one synchronisation a stage, as in transformers' own eager experts.
        for expert in top_k_index.unique().tolist():
            row, column = torch.where(top_k_index == expert)
            gate_up = self._apply_gate(
                nn.functional.linear(hidden_states[row], self._weight("gate_up", expert, output))
            )
            down = nn.functional.linear(gate_up, self._weight("down", expert, output))
            output.index_add_(0, row, (down * top_k_weights[row, column, None]).to(output.dtype))
        return output

    def _weight(self, name: str, expert: int, like: torch.Tensor) -> torch.Tensor:
        codes, scales = self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scales")
        return dequantize_fp4(codes[expert], scales[expert], like.dtype)


class DraftDecoderLayer(DeepseekV4DecoderLayer):
    """One layer on residual streams; the context has passed `hidden_norm` already and is not normed again."""

    def __init__(self, config: DSparkConfig, layer_idx: int):
        theirs = _theirs(config)
        super().__init__(theirs, layer_idx)
        self.self_attn = DraftAttention(theirs, layer_idx)
        if config.backbone_config["experts"] == "packed":
            self.mlp.experts = PackedExperts(theirs)
        self._std = config.initializer_range

    def forward(self, hidden_states, context, position_embeddings, cache, attention_mask=None):
        """Shapes as in `DraftAttention`, but of the streams [B, g, hc_mult, H]."""
        return super().forward(
            hidden_states,
            context=context,
            position_embeddings=position_embeddings,
            cache=cache,
            attention_mask=attention_mask,
        )

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Random weights where transformers' general rule knows none."""
        init.zeros_(self.self_attn.sinks)
        init.normal_(self.mlp.gate.weight, std=self._std)
        init.zeros_(self.mlp.gate.e_score_correction_bias)
        if isinstance(self.mlp.experts, DeepseekV4Experts):
            init.normal_(self.mlp.experts.gate_up_proj, std=self._std)
            init.normal_(self.mlp.experts.down_proj, std=self._std)
        for mixer in (self.attn_hc, self.ffn_hc):
            init.normal_(mixer.fn, std=self._std)
            init.zeros_(mixer.base)
            init.ones_(mixer.scale)


class HyperHead(DeepseekV4HyperHead):
    """Collapses the streams [B, g, hc_mult, H] behind the last layer to [B, g, H]."""

    def __init__(self, config: DSparkConfig):
        super().__init__(_theirs(config))
        self.to(torch.float32)
        self._std = config.initializer_range

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Random weights where transformers' general rule knows none."""
        init.normal_(self.hc_fn, std=self._std)
        init.zeros_(self.hc_base)
        init.ones_(self.hc_scale)


class RotaryEmbedding(DeepseekV4RotaryEmbedding):
    """Cosines and sines of layers without compression, in fp32."""

    def __init__(self, config: DSparkConfig):
        super().__init__(_theirs(config))
        self.draft_config = config

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(hidden_states.float(), position_ids, "main")


class DeepseekV4Backbone:
    """The modules a draft of this backbone is built from."""

    DecoderLayer = DraftDecoderLayer
    RMSNorm = DeepseekV4RMSNorm
    RotaryEmbedding = RotaryEmbedding
    HyperHead = HyperHead
    # Parts that stay in fp32 whatever the draft is loaded in; the layer norms' weights with them, as in the target.
    in_fp32 = ("attn_hc", "ffn_hc", "hc_head", "sinks", "e_score_correction_bias", "q_a_norm", "kv_norm", "layernorm")
