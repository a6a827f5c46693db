"""Tiny random targets and drafts from configs, and drafts of a known quality. No network, fp32, one thread."""

import random
from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_dspark import DSparkConfig, DSparkDraftModel

WINDOW = 12  # of every sliding layer: generations in the tests are well longer

_SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}

# What an architecture's config needs beyond the common fields.
KINDS: dict[str, dict] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "layer_types": _SLIDING_THEN_FULL, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": _SLIDING_THEN_FULL, "query_pre_attn_scalar": 16},
    "gemma4_text": {
        "sliding_window": WINDOW,
        "layer_types": _SLIDING_THEN_FULL,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
    },
    "gpt_oss": {
        "sliding_window": WINDOW,
        "layer_types": _SLIDING_THEN_FULL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "phi3": {},
    "deepseek_v3": {
        **_ROUTED,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "smollm3": {},
    "glm4_moe": {**_ROUTED, "topk_group": 1},
    "cohere2": {"sliding_window": WINDOW, "layer_types": _SLIDING_THEN_FULL},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
}

HEADS = ("none", "vanilla", "gated", "rnn")

# Share of positions at which a scripted draft proposes another token than the target's. None: left as it is, random.
QUALITIES = {"garbage": None, "noisy": 0.5, "near-perfect": 0.1, "perfect": 0.0}


def make_tiny_target(
    kind: str = "qwen3",
    seed: int = 0,
    vocab_size: int = 64,
    *,
    attention: str | None = None,
    scale: float = 3.0,
    **fields,
) -> PreTrainedModel:
    """A random target of 4 layers; weights are scaled so that its logits differ. `fields` go to its config.

    `attention` None is the architecture's default: sdpa where it has that.
    """
    common = {
        "vocab_size": vocab_size,
        "vocab_size_per_layer_input": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(kind, **{**common, **KINDS.get(kind, {}), **fields})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        target = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(target.generation_config, name, None)
    return target


def make_tiny_draft(
    target: PreTrainedModel,
    *,
    head: str = "vanilla",
    rank: int = 8,
    confidence: bool = True,
    taps: tuple[int, ...] = (0, 2),
    block_size: int = 4,
    seed: int = 0,
    draft_class: type[DSparkDraftModel] = DSparkDraftModel,
    **fields,
) -> DSparkDraftModel:
    """A random draft of one layer for `target`, which shares the target's embedding and lm_head."""
    theirs = target.config.get_text_config(decoder=True)
    rank = 0 if head == "none" else rank
    settings = {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "num_target_layers": theirs.num_hidden_layers,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "block_size": block_size,
        "target_layer_ids": list(taps),
        "mask_token_id": theirs.vocab_size - 1,
        "markov_rank": rank,
        "markov_head_type": "vanilla" if head == "none" else head,
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": confidence and rank > 0,
    }
    config = DSparkConfig(**settings | fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = draft_class(config).eval()
        with torch.no_grad():
            for name, parameter in draft.named_parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(3.0)
                if "confidence_head" in name:  # spread around 0.5, so that thresholds cut anywhere
                    parameter.normal_(std=0.5)
    return draft


class ScriptedDraft(DSparkDraftModel):
    """A draft that knows what the target will say, and is wrong exactly where its script says so.

    The whole forward runs; only its base logits are pushed, by far more than any Markov bias or penalty.
    """

    PUSH = 1e6
    proposals: dict[int, int] = {}  # position -> token proposed there

    def follow(self, sequence: list[int], *, error_rate: float, seed: int = 0) -> "ScriptedDraft":
        """Propose `sequence` (prompt and continuation, without masked tokens), with some errors."""
        rng = random.Random(seed)
        self.wrong: set[int] = set()
        self.proposals = {}
        for position, token in enumerate(sequence):
            if rng.random() < error_rate:
                self.wrong.add(position)
                token = (token + rng.randrange(1, self.config.vocab_size)) % self.config.vocab_size
            self.proposals[position] = token
        return self

    def forward(self, features, block_ids, position_ids, *args, **kwargs):
        self._block_positions = position_ids[:, -block_ids.shape[1] :]
        return super().forward(features, block_ids, position_ids, *args, **kwargs)

    def compute_logits(self, hidden_states):
        logits = super().compute_logits(hidden_states)
        for row, positions in enumerate(self._block_positions.tolist()):
            for k in range(logits.shape[1]):
                token = self.proposals.get(positions[k] + 1)  # a position predicts the token after it
                if token is not None:
                    logits[row, k, token] += self.PUSH
        return logits


class ScriptedRows(DSparkDraftModel):
    """A draft that knows what the target will say in several rows, and finds a row by the anchor at its position."""

    scripts: Sequence[tuple[list[int], list[int]]] = ()  # what a row says from its prompt on, and what is proposed

    def follow_rows(
        self, sequences: Sequence[list[int]], error_rates: float | Sequence[float], seed: int = 0
    ) -> "ScriptedRows":
        """Propose `sequences` (prompts without padding, and continuations), each with its share of errors."""
        rng, vocab_size = random.Random(seed), self.config.vocab_size
        rates = [error_rates] * len(sequences) if isinstance(error_rates, float) else error_rates
        self.scripts = []
        for sequence, rate in zip(sequences, rates, strict=True):
            wrong = [rng.randrange(1, vocab_size) if rng.random() < rate else 0 for _ in sequence]
            proposed = [(token + shift) % vocab_size for token, shift in zip(sequence, wrong, strict=True)]
            self.scripts.append((sequence, proposed))
        return self

    def proposal(self, position: int, anchor: int) -> list[int]:
        """Tokens proposed behind `anchor` at `position`; where rows agree there, the first one's."""
        for sequence, proposed in self.scripts:
            if sequence[position : position + 1] == [anchor]:
                return proposed[position + 1 :][: self.config.block_size]
        return []

    def scripted_rounds(self, sequence: list[int], prompt_length: int) -> list[int]:
        """Tokens each round must emit in a row that ends with `sequence`."""
        rounds, committed = [], prompt_length + 1  # the prefill emits one
        while committed < len(sequence):
            proposed = self.proposal(committed - 1, sequence[committed - 1])
            pairs = zip(proposed, sequence[committed:], strict=False)
            accepted = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(proposed))
            rounds.append(min(accepted + 1, len(sequence) - committed))
            committed += rounds[-1]
        return rounds

    def forward(self, features, block_ids, position_ids, *args, **kwargs):
        self._anchors = list(zip(position_ids[:, -block_ids.shape[1]].tolist(), block_ids[:, 0].tolist(), strict=True))
        return super().forward(features, block_ids, position_ids, *args, **kwargs)

    def compute_logits(self, hidden_states):
        logits = super().compute_logits(hidden_states)
        for row, anchor in enumerate(self._anchors):
            for k, token in enumerate(self.proposal(*anchor)[: logits.shape[1]]):
                logits[row, k, token] += ScriptedDraft.PUSH
        return logits


class NextToken(ScriptedRows):
    """A draft that knows two of three next tokens, and nothing behind them: these depend on all it has read."""

    def proposal(self, position: int, anchor: int) -> list[int]:
        return super().proposal(position, anchor)[: position % 3][:1]


def make_draft_of_quality(
    target: PreTrainedModel, sequence: list[int], quality: str, *, seed: int = 0, **kwargs
) -> DSparkDraftModel:
    """A draft for `target`, which goes on plainly as in `sequence`; `quality` is a key of QUALITIES."""
    draft = make_tiny_draft(target, seed=seed, draft_class=ScriptedDraft, **kwargs)
    error_rate = QUALITIES[quality]
    if error_rate is not None:
        draft.follow(sequence, error_rate=error_rate, seed=seed)
    return draft


def scripted_rounds(draft: ScriptedDraft, prompt_length: int, length: int) -> list[int]:
    """Tokens each round must emit when `draft` follows its script from a prompt without padding up to `length`."""
    rounds, committed = [], prompt_length + 1  # the prefill emits one
    while committed < length:
        accepted, drafted = 0, min(draft.config.block_size, length - committed - 1)
        while accepted < drafted and committed + accepted not in draft.wrong:
            accepted += 1
        rounds.append(accepted + 1)
        committed += accepted + 1
    return rounds


def random_prompt(vocab_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [1, length] without 0, which tests use for padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size - 1, (1, length), generator=generator)


def left_padded(prompts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts [n] as generate() takes them together, with zeros in front of the shorter ones."""
    length = max(map(len, prompts))
    ids = torch.stack([pad(prompt, (length - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([pad(torch.ones_like(prompt), (length - len(prompt), 0)) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def plain(target: PreTrainedModel, input_ids: torch.Tensor, **kwargs):
    """Greedy plain generate()."""
    return target.generate(input_ids, **{"do_sample": False, **kwargs})


def speculate(target: PreTrainedModel, draft: DSparkDraftModel, input_ids: torch.Tensor, **kwargs):
    """Greedy generate() with the draft as assistant."""
    return target.generate(input_ids, assistant_model=draft, **{"do_sample": False, **kwargs})
