"""DSparkConfig: our field names, validated once. `dialects.py` translates what other tools write."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .dialects_deepseek_v4 import BACKBONE_KEYS

MARKOV_HEAD_TYPES = ("vanilla", "gated", "rnn")
BACKBONE_TYPES = ("qwen3", "gemma4", "deepseek_v4")
DEEPSEEK_V4_FIELDS = ("experts", "n_routed_experts", "num_experts_per_tok", *BACKBONE_KEYS)
LAYER_TYPES = ("full_attention", "sliding_attention")


@strict
class DSparkConfig(PreTrainedConfig):
    """Configuration of a DSpark draft.

    Args:
        backbone_type: decoder layers of the draft; "qwen3", "gemma4" or "deepseek_v4".
        backbone_config: what one backbone alone knows; gemma4: `attention_k_eq_v` (values are made from the keys);
            deepseek_v4: its own fields under transformers' names, and `experts`: "packed" or "dequantized".
        embed_scale: factor on embedded tokens; None is 1.
        final_logit_softcapping: base logits pass cap * tanh(logits / cap); None leaves them.
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            head_dim, hidden_act, rms_norm_eps, attention_bias, attention_dropout, max_position_embeddings,
            rope_parameters: of the draft's decoder layers, named as in transformers. `hidden_size` and `vocab_size`
            are the target's. `rope_parameters` must hold `rope_theta`: no default is right for every target.
        layer_types, sliding_window: layers of type "sliding_attention" see so many positions of the context before the
            anchor, and the block; without `layer_types` a window holds for all layers.
        attention_sinks: each head of each layer has a learned logit that takes attention and gives no value.
        rope_interleaved: rotary pairs are neighbouring channels instead of halves of a head.
        block_size: tokens drafted in one round.
        first_slot: 0 where the anchor's own position predicts the first token, 1 where the first mask's does.
        causal: positions of a block see those before them only, not the whole block; in a draft that mixes full and
            sliding layers, in the sliding ones.
        target_layer_ids: target layers the draft reads, 0-based outputs, strictly increasing; -1 is the embedding.
        mask_token_id: input token of block positions 2 to `block_size`.
        num_target_layers: decoder layers of the target the draft was trained for; None if unknown.
        draft_vocab_size: number of the target's tokens that the draft can propose (its `d2t` tensor lists them); None
            is the whole vocabulary.
        markov_rank: rank of the sequential head; 0 is a draft without one.
        markov_head_type: "vanilla", "gated" or "rnn".
        enable_confidence_head, confidence_head_with_markov, confidence_head_bias: whether there is one, whether it
            reads W1[x_{k-1}], and whether it has a bias.
        confidence_temperatures: T_k of the calibrated confidence sigmoid(logit_k / T_k), one for each block position
            (`hf-dspark calibrate` fits them); None is the head as it was trained.
        confidence_shift: what is added to every confidence logit before that (`hf-dspark calibrate --shift`).
        has_embed_tokens, has_lm_head: whether the draft holds its own copies; otherwise the target's are used.
    """

    model_type = "dspark"

    backbone_type: str = "qwen3"
    backbone_config: dict | None = None
    embed_scale: float | None = None
    final_logit_softcapping: float | None = None
    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 5
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    attention_sinks: bool = False
    rope_interleaved: bool = False
    block_size: int = 7
    first_slot: int = 0
    causal: bool = False
    target_layer_ids: list[int] | None = None
    mask_token_id: int | None = None
    num_target_layers: int | None = None
    draft_vocab_size: int | None = None
    markov_rank: int = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    confidence_head_bias: bool = True
    confidence_temperatures: list[float | int] | None = None
    confidence_shift: float | int = 0.0
    has_embed_tokens: bool = False
    has_lm_head: bool = False

    @property
    def num_block_inputs(self) -> int:
        """Positions the draft reads in a round: the anchor and masks."""
        return self.block_size + self.first_slot

    def __post_init__(self, **kwargs):
        if self.target_layer_ids is not None:  # DSparkConfig() is legal, as for any config; a draft needs its taps
            self._check_draft()
            self._check_rope(kwargs)
        super().__post_init__(**kwargs)

    def _check_draft(self) -> None:
        if self.backbone_type not in BACKBONE_TYPES:
            raise ValueError(f"`backbone_type` must be one of {BACKBONE_TYPES}, got {self.backbone_type!r}.")
        if self.block_size < 1:
            raise ValueError(
                f"`block_size` is the number of drafted tokens and must be at least 1, got {self.block_size}."
            )
        self._check_attention()
        taps = self.target_layer_ids
        if not taps or min(taps) < -1 or taps != sorted(set(taps)):
            raise ValueError(
                f"`target_layer_ids` must be strictly increasing layers from 0 (-1: the embedding), got {taps}. "
                "They are part of the trained draft: take them from its model card."
            )
        if self.num_target_layers is not None and max(taps) >= self.num_target_layers:
            raise ValueError(
                f"`target_layer_ids` {taps} name a layer that a target of {self.num_target_layers} layers "
                "(`num_target_layers`) does not have. Correct the one that is wrong."
            )
        if self.mask_token_id is None or not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` must be a token of the vocabulary (0 to {self.vocab_size - 1}), got "
                f"{self.mask_token_id}. It is part of the trained draft: take it from its model card."
            )
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` counts tokens of the target's vocabulary of {self.vocab_size} and must be 1 to "
                f"that, or None for all of them; got {self.draft_vocab_size}."
            )
        if self.markov_rank < 0:
            raise ValueError(f"`markov_rank` must be 0 (no sequential head) or more, got {self.markov_rank}.")
        if self.markov_head_type not in MARKOV_HEAD_TYPES:
            raise ValueError(f"`markov_head_type` must be one of {MARKOV_HEAD_TYPES}, got {self.markov_head_type!r}.")
        if self.enable_confidence_head and self.confidence_head_with_markov and self.markov_rank == 0:
            raise ValueError(
                "`confidence_head_with_markov` is True, but `markov_rank` 0 has no Markov embedding to read. "
                "Set it to False, or give the draft a sequential head."
            )
        if self.confidence_temperatures is not None:
            self._check_temperatures(self.confidence_temperatures)

    def _check_attention(self) -> None:
        if self.first_slot not in (0, 1):
            raise ValueError(
                "`first_slot` must be 0 (the anchor's position predicts) or 1 (the first mask's), got "
                f"{self.first_slot}."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"`sliding_window` must be at least 1, or None, got {self.sliding_window}.")
        if self.backbone_type == "gemma4" and (
            self.sliding_window is not None or self.attention_sinks or self.rope_interleaved
        ):
            raise ValueError(
                "A draft of gemma4 layers has neither a sliding window nor sinks nor interleaved rope here, got "
                f"`sliding_window` {self.sliding_window}, `attention_sinks` {self.attention_sinks}, "
                f"`rope_interleaved` {self.rope_interleaved}."
            )
        if self.backbone_type == "deepseek_v4":
            self._check_deepseek_v4()
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPES[self.sliding_window is not None]] * self.num_hidden_layers
        types = self.layer_types
        if len(types) != self.num_hidden_layers or not set(types) <= set(LAYER_TYPES):
            raise ValueError(
                f"`layer_types` must name one of {LAYER_TYPES} for each of {self.num_hidden_layers} layers, got "
                f"{types}."
            )
        if "sliding_attention" in types and self.sliding_window is None:
            raise ValueError("`layer_types` has sliding layers, so `sliding_window` must say how wide they are.")

    def _check_deepseek_v4(self) -> None:
        fixed = {"attention_sinks": True, "rope_interleaved": True, "causal": False, "first_slot": 0}
        wrong = {name: getattr(self, name) for name, value in fixed.items() if getattr(self, name) != value}
        if wrong or self.sliding_window is None:
            raise ValueError(
                f"A draft of deepseek_v4 layers always has {fixed} and a `sliding_window`, got {wrong} and "
                f"`sliding_window` {self.sliding_window}. Take the config that was saved with the draft."
            )
        own = self.backbone_config or {}
        missing = [name for name in DEEPSEEK_V4_FIELDS if own.get(name) is None]
        if missing or own["experts"] not in ("packed", "dequantized"):
            raise ValueError(
                f"`backbone_config` of a draft of deepseek_v4 layers must hold {', '.join(DEEPSEEK_V4_FIELDS)}, and "
                f'`experts` is "packed" or "dequantized"; got {own}. Take the config that was saved with the draft.'
            )
        if not 1 <= own["num_experts_per_tok"] <= own["n_routed_experts"]:
            raise ValueError(
                f"`num_experts_per_tok` must be 1 to `n_routed_experts` ({own['n_routed_experts']}), got "
                f"{own['num_experts_per_tok']}. Correct the one that is wrong."
            )

    def _check_temperatures(self, temperatures: list[float | int]) -> None:
        if not self.enable_confidence_head:
            raise ValueError(
                f"`confidence_temperatures` {temperatures} calibrate a confidence head, and this draft has none "
                "(`enable_confidence_head` is False). Remove them from the config."
            )
        # Shorter blocks than the one they were fitted for use the first of them.
        if len(temperatures) < self.block_size or not all(0 < t < float("inf") for t in temperatures):
            raise ValueError(
                "`confidence_temperatures` must be positive numbers, one for each of the block's "
                f"{self.block_size} positions, got {temperatures}. Fit them with `hf-dspark calibrate`, or set None."
            )

    def _check_rope(self, kwargs: dict) -> None:
        if (self.rope_parameters or {}).get("rope_theta") is None and kwargs.get("rope_theta") is None:
            raise ValueError(
                f"`rope_parameters` must hold `rope_theta`, got {self.rope_parameters}. There is no default: with a "
                "wrong one the draft runs and nothing is accepted. Take it from the draft's or the target's config."
            )
