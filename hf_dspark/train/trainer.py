"""train(): prompts, answers, steps, checkpoints. Every part is resumable; a resumed run ends in the same weights."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging

from ..compat import enable_activation_checkpointing
from ..modeling_dspark import DSparkDraftModel
from .anchors import Blocks, blocks_of_draft, sample_anchors, stack_blocks
from .answers import Sample, read_answers, write_answers
from .config import TrainConfig
from .optimizers import build_optimizers
from .prompts import read_prompts, split_held_out
from .shape import draft_config, frequent_tokens
from .states import StateSource
from .step import TrainingStep
from .target import FrozenTarget, stack_states

logger = logging.get_logger(__name__)


def train(config: TrainConfig) -> Path:
    """Train a draft for `config.target`; returns the folder of the finished draft (`config.output`).

    Runs on a CPU, one GPU, or several under `accelerate launch` or `torchrun`. Interrupted, the same call goes on:
    what the target wrote is kept, and the newest checkpoint is loaded. Raises ValueError where `output` holds another
    run.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision if config.mixed_precision != "no" else None,
        log_with=config.tracker,
        # A process waits for the others while they write answers, which may take hours.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    output = Path(config.output)
    with accelerator.main_process_first():
        _claim(output, config)
    tokenizer = AutoTokenizer.from_pretrained(config.target)
    model = AutoModelForCausalLM.from_pretrained(config.target, dtype=config.dtype).to(accelerator.device)
    training, held_out = _samples(accelerator, model, tokenizer, config, output)
    set_seed(config.seed)  # the same first weights on every process, whatever each of them wrote before
    draft = _draft(model, tokenizer, config, training)
    target = FrozenTarget(model, draft.config.target_layer_ids, draft.draft_token_ids)
    states = StateSource(target, output / "states" if config.feature_cache else None, [*training, *held_out])
    run = _Run(accelerator, config, draft, states, TrainingStep(draft, target, chunk_rows=config.chunk_rows))
    run.loop(training, held_out)
    weights = accelerator.get_state_dict(run.step)  # whole on the main process also where they are sharded
    if accelerator.is_main_process:
        finished = DSparkDraftModel(draft.config).to(model.dtype)
        finished.load_state_dict({name.removeprefix("draft."): weight for name, weight in weights.items()})
        finished.save_pretrained(output)
    accelerator.wait_for_everyone()  # a process that leaves while others still exchange tensors breaks theirs off
    accelerator.end_training()
    return output


class _Run:
    """The optimizer's loop over samples."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, draft, states: StateSource, step: TrainingStep):
        self.accelerator, self.config, self.states = accelerator, config, states
        self.draft_config = draft.config
        if config.batch_size % accelerator.num_processes:
            raise ValueError(
                f"`batch_size` {config.batch_size} counts the sequences of a step over all processes, and must be a "
                f"multiple of their number, {accelerator.num_processes}."
            )
        if config.optimizer == "muon" and accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        ):
            raise ValueError(
                "Muon needs whole matrices, and this run shards them (FSDP or DeepSpeed). Train with the optimizer "
                "`adamw`, or on several devices with DDP (examples/accelerate/ddp.yaml)."
            )
        if config.gradient_checkpointing:
            enable_activation_checkpointing(draft)
        optimizers = build_optimizers(draft, config.optimizer, config.learning_rate)
        warmup = round(config.warmup_ratio * config.steps)
        # Stepped by hand once a step: accelerate would step them once for every process.
        self.schedules = [get_cosine_schedule_with_warmup(o, warmup, config.steps) for o in optimizers]
        self.step, *self.optimizers = accelerator.prepare(step, *optimizers)
        accelerator.register_for_checkpointing(*self.schedules)
        self.checkpoints = Path(config.output) / "checkpoints"

    def loop(self, training: list[Sample], held_out: list[Sample]) -> None:
        config, accelerator = self.config, self.accelerator
        first = self._resume()
        if config.tracker:
            accelerator.init_trackers("hf_dspark", config={k: str(v) for k, v in asdict(config).items()})
        shown = accelerator.is_main_process
        with tqdm(total=config.steps, initial=first, desc="training", disable=not shown) as bar:
            for number in range(first, config.steps):
                figures = self.step_once(number, training)
                bar.update()
                bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
                done = number + 1
                if held_out and (done % config.eval_every == 0 or done == config.steps):
                    figures |= self.evaluate(held_out)
                    self._log(done, figures)
                if config.tracker:
                    accelerator.log(figures, step=done)
                if done % config.save_every == 0 or done == config.steps:
                    self._save(done)

    def step_once(self, number: int, training: list[Sample]) -> dict[str, float]:
        """One optimizer step; every process takes its share of the batch."""
        batch = [(sample, self._anchors(sample, number)) for sample in _batch(training, number, self.config)]
        # Weights need no forward, so every process knows the sum over the whole step without asking the others.
        blocks = [self._blocks(sample, anchors) for sample, anchors in batch]
        weight = float(sum(b.weights.sum() for b in blocks))
        world = self.accelerator.num_processes
        mine = list(zip(batch, blocks, strict=True))[self.accelerator.process_index :: world]
        loss = torch.zeros((), device=self.accelerator.device)
        size = self.config.micro_batch_size
        for start in range(0, len(mine), size):
            micro_batch, is_last = mine[start : start + size], start + size >= len(mine)
            states = stack_states(self.states.read_all([sample for (sample, _), _ in micro_batch]))
            with nullcontext() if is_last else self.accelerator.no_sync(self.step):
                with self.accelerator.autocast():
                    part, _ = self.step(states, stack_blocks([block for _, block in micro_batch]))
                # DDP averages gradients over processes; the loss is a mean over all of their rows.
                part = part / weight
                self.accelerator.backward(part * world)
            loss += part.detach()
        self.accelerator.clip_grad_norm_(self.step.parameters(), self.config.max_grad_norm)
        for stepped in (*self.optimizers, *self.schedules):
            stepped.step()
        self.step.zero_grad()
        return {"loss": float(self.accelerator.reduce(loss, "sum"))}

    @torch.no_grad()
    def evaluate(self, held_out: list[Sample]) -> dict[str, float]:
        """Teacher-forced accepted length on held-out text: 1 + sum of survival, at temperature 1 and greedy."""
        block_size = self.draft_config.block_size
        totals = torch.zeros(3, device=self.accelerator.device)
        world = self.accelerator.num_processes
        # Every process runs as many forwards as the others, which sharded weights wait for; some do not count.
        for position in range(self.accelerator.process_index, -(-len(held_out) // world) * world, world):
            sample = held_out[position % len(held_out)]
            blocks = self._blocks(sample, self._anchors(sample, -1))
            with self.accelerator.autocast():
                _, outcomes = self.step(self.states.read(sample), blocks)
            whole = (blocks.weights > 0).all(-1) & (position < len(held_out))
            supervised = (blocks.weights > 0).to(outcomes.overlap.device)
            survival = []
            for values in (outcomes.overlap, outcomes.agrees.float()):
                rows = torch.zeros(supervised.shape, device=values.device)
                rows[supervised] = values
                survival.append(rows[whole].cumprod(-1).sum())
            totals += torch.stack([*survival, whole.sum().to(totals.device)])
        sampled, greedy, count = self.accelerator.reduce(totals, "sum").tolist()
        if count == 0:
            return {}
        assert block_size >= 1
        return {"tau_sampled": 1 + sampled / count, "tau_greedy": 1 + greedy / count}

    def _anchors(self, sample: Sample, number: int) -> torch.Tensor:
        """Anchors of a sample in a step: a function of seed, step and sample, whatever was interrupted before."""
        generator = torch.Generator().manual_seed(hash((self.config.seed, number, sample.index)) % 2**63)
        return sample_anchors(sample, self.config.num_anchors, generator).to(self.accelerator.device)

    def _blocks(self, sample: Sample, anchors: torch.Tensor) -> Blocks:
        return blocks_of_draft(self.draft_config, sample, anchors, position_decay=self.config.position_decay)

    def _save(self, done: int) -> None:
        """Write a checkpoint beside its place and rename it; the one before the newest is kept, older ones go."""
        folder = self.checkpoints / f"step_{done:07d}"
        unfinished = folder.with_suffix(".unfinished")
        self.accelerator.save_state(str(unfinished), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
            for old in sorted(self.checkpoints.glob("step_*[0-9]"))[:-2]:
                shutil.rmtree(old)

    def _resume(self) -> int:
        """Load the newest checkpoint; the number of steps it has done."""
        saved = sorted(self.checkpoints.glob("step_*[0-9]"))
        if not saved:
            return 0
        self.accelerator.load_state(str(saved[-1]))
        return int(saved[-1].name.removeprefix("step_"))

    def _log(self, done: int, figures: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (Path(self.config.output) / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": done, **figures}) + "\n")


def _claim(output: Path, config: TrainConfig) -> None:
    """Write down what this run is, or check that `output` belongs to the same run."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "train.json"
    asked = json.loads(json.dumps(asdict(config)))
    if not file.exists():
        file.write_text(json.dumps(asked, indent=1), encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = sorted(name for name in asked if asked[name] != before.get(name) and name != "output")
    if changed:
        raise ValueError(
            f"{output} holds a run with other settings ({', '.join(changed)}). Go on with those of its train.json, or "
            "give another output folder."
        )


def _samples(
    accelerator: Accelerator, model, tokenizer, config: TrainConfig, output: Path
) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples; what is on disk already is only read."""
    with accelerator.main_process_first():  # the others find the file
        conversations = _conversations(model, tokenizer, config, output / "prompts.jsonl")
    passes = [(0, conversations)]  # number of the first answer, and what is answered
    for _ in range(1, config.answers_per_prompt):
        passes.append((passes[-1][0] + len(passes[-1][1]), conversations[config.held_out :]))
    for first_index, answered in passes:
        write_answers(
            model,
            tokenizer,
            answered,
            output,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.answer_batch_size,
            chat_template=config.chat_template,
            seed=config.seed,
            generation=config.generation,
            first_index=first_index,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
    accelerator.wait_for_everyone()
    samples = read_answers(output)
    cut = [_cut(sample, config.max_length) for sample in samples]
    usable = [sample for sample in cut if any(stop - start > 1 for start, stop in sample.answer_spans)]
    held_out = [sample for sample in usable if sample.index < config.held_out]
    training = [sample for sample in usable if sample.index >= config.held_out]
    if not training:
        raise ValueError(
            f"None of {len(conversations)} conversations is left to train on ({config.held_out} are held out, the "
            "rest have answers of under two tokens). Give more prompts, or a smaller `held_out`."
        )
    return training, held_out


def _conversations(model, tokenizer, config: TrainConfig, file: Path) -> list[list[str]]:
    """The run's prompts, those held out first."""
    if file.exists():
        return [json.loads(line)["turns"] for line in file.read_text(encoding="utf-8").splitlines()]
    excluded = [turns[0] for turns in read_prompts(config.exclude)] if config.exclude else []
    conversations = read_prompts(config.prompts, target=model, tokenizer=tokenizer, seed=config.seed, exclude=excluded)
    training, held_out = split_held_out(conversations, config.held_out, config.seed)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in held_out + training))
    unfinished.replace(file)
    return held_out + training


def _cut(sample: Sample, max_length: int) -> Sample:
    spans = [(start, min(stop, max_length)) for start, stop in sample.answer_spans if start < max_length]
    return Sample(sample.index, sample.input_ids[:max_length], spans)


def _draft(model, tokenizer, config: TrainConfig, training: list[Sample]) -> DSparkDraftModel:
    """A new draft, or the one to start from; trained in fp32 whatever the target's dtype is."""
    if config.warm_start is not None:
        draft = DSparkDraftModel.from_pretrained(config.warm_start, target=model, dtype=torch.float32)
    else:
        shape = draft_config(
            model,
            tokenizer,
            layers=config.layers,
            block_size=config.block_size,
            markov_rank=config.markov_rank,
            head=config.head,
            taps=config.taps,
            mask_token_id=config.mask_token_id,
            confidence=config.confidence,
            draft_vocab_size=config.draft_vocab_size,
        )
        draft = DSparkDraftModel(shape)
        if shape.draft_vocab_size is not None:
            draft.set_draft_tokens(frequent_tokens(training, shape.draft_vocab_size, shape.vocab_size))
        draft.bind_target(model)
    if len(set(draft.config.layer_types)) > 1:
        raise ValueError(
            f"The draft {config.warm_start!r} mixes full and sliding layers ({draft.config.layer_types}), which "
            "packed training does not. Start from one whose layers are alike, or from nothing."
        )
    draft.config.confidence_temperatures, draft.config.confidence_shift = None, 0.0  # of the heads as they were before
    draft.to(model.device, torch.float32).train()
    if config.trainable != "all":
        heads = [draft.confidence_head] + ([draft.markov_head] if config.trainable == "heads" else [])
        if not any(heads):
            raise ValueError(f"The draft {config.warm_start!r} has no such head to train ({config.trainable}).")
        draft.requires_grad_(False)
        for head in filter(None, heads):
            head.requires_grad_(True)
    return draft


def _batch(training: list[Sample], number: int, config: TrainConfig) -> Iterator[Sample]:
    """The samples of step `number`: epochs are permutations by seed, so a resumed run sees the same ones."""
    for position in range(number * config.batch_size, (number + 1) * config.batch_size):
        epoch, index = divmod(position, len(training))
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(config.seed + epoch))
        yield training[order[index]]
