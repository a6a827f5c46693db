"""A target and a draft of a real model's shape with random weights, and with a text that both know.

The weights say that token x + 1 comes after token x. The target always goes on so; the draft's Markov head says so,
too, except after certain tokens, which lie where a draft of constant conditional acceptance would be rejected. Nothing
but weights steers the outcome: all that costs time really runs, in any loop, and the device is read no more often.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from ..configuration_dspark import DSparkConfig
from ..modeling_dspark import DSparkDraftModel

_NUM_DRAFT_LAYERS = 5
_MAX_CONTEXT = 40960
# Factor on what a layer adds to the residual stream: together the layers do not drown the embedded token.
_LAYER_SCALE = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a target, and of the draft that was released for it."""

    hidden_size: int
    intermediate_size: int
    num_layers: int  # of the target
    num_attention_heads: int
    target_layer_ids: tuple[int, ...]
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    mask_token_id: int = 151669
    markov_rank: int = 256

    @property
    def layer_fields(self) -> dict[str, int | dict]:
        """Config fields that target and draft have in common."""
        names = (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        )  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 1e6}
        common = {"rope_parameters": rope, "max_position_embeddings": _MAX_CONTEXT}
        return {name: getattr(self, name) for name in names} | common


SHAPES = {
    "qwen3-4b": Shape(2560, 9728, 36, 32, (1, 9, 17, 25, 33)),
    "qwen3-8b": Shape(4096, 12288, 36, 32, (1, 9, 17, 25, 33)),
    "qwen3-14b": Shape(5120, 17408, 40, 40, (1, 10, 19, 28, 37)),
    "tiny": Shape(128, 256, 4, 4, (0, 2), 2, 32, vocab_size=8192, mask_token_id=8191, markov_rank=128),
}


@dataclass(frozen=True, slots=True)
class SimulatedPair:
    """The two models, and where rounds begin in their text."""

    target: PreTrainedModel
    draft: DSparkDraftModel
    tau: float  # as asked for
    round_starts: torch.Tensor  # [rounds+1]  rising token ids, which are positions in the text; on the CPU

    def passages(self, num_rows: int, num_tokens: int) -> tuple[torch.Tensor, int, int]:
        """Passages of about `num_tokens` tokens that end where a round does.

        Returns the first tokens [B], how many rounds each passage takes, and its length: a first token, which is the
        prefill's, and as many as make the rounds emit tau in the mean, to half a token in all.
        """
        num_rounds = max(1, round((num_tokens - 1) / self.tau))
        emitted = self.round_starts[num_rounds:] - self.round_starts[:-num_rounds]
        if len(emitted) < num_rows:
            raise ValueError(
                f"{num_rows} passages of {num_tokens} tokens were asked for, and the text of this shape has "
                f"{int(self.round_starts[-1])} tokens. Ask for fewer tokens."
            )
        total = round(num_rounds * self.tau)
        rows = (emitted - total).abs().argsort(stable=True)[:num_rows]
        return self.round_starts[rows], num_rounds, 1 + total


@torch.no_grad()
def make_pair(
    name: str,
    tau: float,
    *,
    block_size: int = 7,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> SimulatedPair:
    """The pair of the shape `name`, made on `device`, whose rounds emit `tau` tokens in the mean.

    Input and output embeddings are two tensors also where the real target ties them: a forward reads as many bytes.
    Raises ValueError for a tau that no acceptance gives.
    """
    shape = SHAPES[name]
    starts, stumbles = _draw_rounds(shape.vocab_size, acceptance_of(tau, block_size), block_size, seed)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        target = AutoModelForCausalLM.from_config(_target_config(shape), dtype=dtype).eval()
        draft = AutoModel.from_config(_draft_config(shape, block_size), dtype=dtype).eval()
        _teach_target(target)
        _teach_draft(draft, stumbles.to(device))
    draft.bind_target(target)
    return SimulatedPair(target, draft, tau, starts)


def acceptance_of(tau: float, block_size: int) -> float:
    """The conditional acceptance a with 1 + a + ... + a^block_size = tau: tokens that a round emits in the mean."""
    if not 1 <= tau <= block_size + 1:
        raise ValueError(
            f"tau counts the tokens a round emits, from 1 to the block's {block_size} and one more, got {tau}."
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        is_low = sum(middle**k for k in range(block_size + 1)) < tau
        low, high = (middle, high) if is_low else (low, middle)
    return high


def _draw_rounds(vocab_size: int, rate: float, block_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rounds begin in the text, and the tokens after which the draft errs."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(vocab_size, 1, dtype=torch.double, generator=generator)
    reached = torch.tensor([rate**k for k in range(1, block_size + 1)], dtype=torch.double)
    accepted = (uniforms < reached).sum(-1)
    starts = nn.functional.pad((accepted + 1).cumsum(0), (1, 0))
    starts = starts[starts < vocab_size]
    is_rejected = accepted[: len(starts) - 1] < block_size
    return starts, starts[1:][is_rejected] - 1


def _teach_target(target: PreTrainedModel) -> None:
    embedding = target.get_input_embeddings().weight
    _fill_with_directions(embedding)
    target.get_output_embeddings().weight.copy_(embedding.roll(1, 0))
    _quiet_layers(target)


def _teach_draft(draft: DSparkDraftModel, stumbles: torch.Tensor) -> None:
    w1, w2 = draft.markov_head.markov_w1.weight, draft.markov_head.markov_w2.weight
    _fill_with_directions(w1)
    w2.copy_(w1.roll(1, 0))
    w1[stumbles] = w1[stumbles + 1]  # so it goes on as after the next token
    draft.norm.weight.fill_(1e-3)  # the base logits do not count
    _quiet_layers(draft)


def _fill_with_directions(table: torch.Tensor) -> None:
    """Random rows, all of length sqrt(columns)."""
    table.normal_()
    table.mul_(table.shape[1] ** 0.5 / table.norm(dim=1, keepdim=True))


def _quiet_layers(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(_LAYER_SCALE)


def _target_config(shape: Shape):
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    layers = {"num_hidden_layers": shape.num_layers, "tie_word_embeddings": False}
    return AutoConfig.for_model("qwen3", **shape.layer_fields, **layers, **no_tokens)


def _draft_config(shape: Shape, block_size: int) -> DSparkConfig:
    return DSparkConfig(
        **shape.layer_fields,
        num_hidden_layers=_NUM_DRAFT_LAYERS,
        num_target_layers=shape.num_layers,
        target_layer_ids=list(shape.target_layer_ids),
        mask_token_id=shape.mask_token_id,
        block_size=block_size,
        markov_rank=shape.markov_rank,
    )
