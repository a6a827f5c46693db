"""What a training run is asked for; saved beside its output, so that a resumed run is the same run."""

from dataclasses import dataclass, field

_LEARNING_RATES = {"muon": 4e-3, "adamw": 6e-4}
TRAINABLE = ("all", "heads", "confidence")
_COUNTS = (
    "steps",
    "batch_size",
    "micro_batch_size",
    "num_anchors",
    "chunk_rows",
    "answers_per_prompt",
    "eval_every",
    "save_every",
)


@dataclass(slots=True)
class TrainConfig:
    """Arguments of `train()` and of `hf-dspark train`.

    Args:
        target: name or folder of the target.
        prompts: sources for `read_prompts`; several are mixed.
        output: folder for prompts, answers, checkpoints and, at its top, the finished draft.
        exclude: jsonl files whose first turns are never trained on.
        steps, batch_size: optimizer steps, and sequences in each, over all processes.
        micro_batch_size: sequences of a process that go through target and draft at once: 1 suits a CPU, a GPU idles
            with less than about 8.
        layers, block_size, markov_rank, head, taps, mask_token_id, confidence: shape of the draft (`draft_config`).
        warm_start: folder or name of a draft to start from, whose shape is kept.
        trainable: "all", "heads" (sequential and confidence head only) or "confidence" (that head only, for a draft
            that is used on other text or at another temperature than it was trained for).
        draft_vocab_size: the draft proposes only the tokens most frequent in the answers, so many of them.
        optimizer: "muon" (orthogonalised momentum for the matrices of layers and `fc`, AdamW for the rest) or "adamw".
        learning_rate: peak of warm-up and cosine; default 4e-3 with muon, 6e-4 with adamw.
        num_anchors: blocks trained in each sequence of a step.
        position_decay: d of the weights exp(-(k-1)/d).
        max_new_tokens, max_length: of an answer; of a sequence (longer ones are cut).
        answers_per_prompt: of the prompts trained on; more than one makes sense where answers are sampled.
        generation: overrides of the target's generation config for the answers, such as {"do_sample": True}.
        held_out: conversations kept from training, for the evaluation every `eval_every` steps.
        feature_cache: keep the target's states on disk; their size is told before the run starts.
    """

    target: str
    prompts: list[str]
    output: str
    exclude: list[str] = field(default_factory=list)
    steps: int = 1000
    batch_size: int = 8
    micro_batch_size: int = 1
    layers: int = 2
    block_size: int = 7
    markov_rank: int = 64
    head: str = "vanilla"
    taps: list[int] | None = None
    mask_token_id: int | None = None
    confidence: bool = True
    draft_vocab_size: int | None = None
    warm_start: str | None = None
    trainable: str = "all"
    optimizer: str = "muon"
    learning_rate: float | None = None
    warmup_ratio: float = 0.04
    max_grad_norm: float = 1.0
    num_anchors: int = 64
    position_decay: float = 4.0
    chunk_rows: int = 64
    max_new_tokens: int = 256
    max_length: int = 2048
    answer_batch_size: int = 32
    answers_per_prompt: int = 1
    generation: dict = field(default_factory=dict)
    chat_template: bool = True
    held_out: int = 32
    eval_every: int = 200
    save_every: int = 200
    feature_cache: bool = False
    gradient_checkpointing: bool = False
    mixed_precision: str = "bf16"
    dtype: str = "auto"
    tracker: str | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.prompts:
            raise ValueError(
                "No prompts were given: name a file or a data set, or let the target write N with `self:N`."
            )
        if self.trainable not in TRAINABLE:
            raise ValueError(f'`trainable` must be "all", "heads" or "confidence", got {self.trainable!r}.')
        if self.optimizer not in _LEARNING_RATES:
            raise ValueError(f"`optimizer` must be one of {sorted(_LEARNING_RATES)}, got {self.optimizer!r}.")
        if self.learning_rate is None:
            self.learning_rate = _LEARNING_RATES[self.optimizer]
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
