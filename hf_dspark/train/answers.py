"""On-policy training text: the target answers the prompts itself, in batches of plain generate().

Resumable, and shared between processes: each appends to a part of its own, `answers.{process}.jsonl`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation as token ids; the draft is trained on the spans that the target wrote."""

    index: int  # of the answer in its run
    input_ids: list[int]
    answer_spans: list[tuple[int, int]]  # [start, stop) of each answer


def write_answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[str]],
    folder: Path,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    chat_template: bool = True,
    seed: int = 0,
    generation: dict | None = None,
    first_index: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """Let the target answer every turn of `conversations`; this process's share of the batches goes to its part.

    Samples are numbered from `first_index`. What any part in `folder` holds when this starts is not written again, and
    a batch has a seed of its own: an interrupted run goes on to the same text, also with another number
    of processes. Sampling follows the target's generation config, or `generation` where given.
    """
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(conversations)), key=lambda i: (sum(map(len, conversations[i])), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    done = {sample.index - first_index for sample in read_answers(folder)}
    shares = list(enumerate(batches))[process_index::num_processes]
    total, written = sum(len(batch) for _, batch in shares), sum(len(done.intersection(batch)) for _, batch in shares)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"answers.{process_index}.jsonl"
    with file.open("a", encoding="utf-8") as out, tqdm(total=total, initial=written, desc="answers") as bar:
        out.write(_end_of_cut_line(file))
        for number, batch in shares:
            if done.issuperset(batch):
                continue
            torch.manual_seed(seed + first_index + number)
            settings = {"max_new_tokens": max_new_tokens, **(generation or {})}
            samples = _answer_batch(target, tokenizer, conversations, batch, chat_template, settings)
            # A batch is written whole and at once: a kill leaves complete lines, and no part of a batch is lost.
            new = [replace(s, index=first_index + s.index) for s in samples if s.index not in done]
            out.write("".join(json.dumps(asdict(sample)) + "\n" for sample in new))
            out.flush()
            bar.update(len(new))


def read_answers(folder: Path) -> list[Sample]:
    """The samples of all parts in `folder`, in the order of their conversations; lines cut off by a kill are left out.

    A conversation that two parts hold (written by runs with another number of processes) is there once.
    """
    samples = {}
    for part in sorted(folder.glob("answers.*.jsonl")):
        for line in part.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            spans = [tuple(span) for span in row["answer_spans"]]
            samples.setdefault(row["index"], Sample(row["index"], row["input_ids"], spans))
    return [samples[index] for index in sorted(samples)]


@torch.no_grad()
def _answer_batch(target, tokenizer, conversations, batch, chat_template: bool, settings: dict) -> list[Sample]:
    """Turn by turn; a conversation with fewer turns than others is finished earlier."""
    messages: dict[int, list[dict]] = {i: [] for i in batch}
    samples: dict[int, Sample] = {}
    for turn in range(max(len(conversations[i]) for i in batch)):
        live = [i for i in batch if turn < len(conversations[i])]
        for i in live:
            messages[i].append({"role": "user", "content": conversations[i][turn]})
        prompts = [_encode(tokenizer, messages[i], chat_template) for i in live]
        answers = _generate(target, tokenizer, prompts, settings)
        for i, prompt, answer in zip(live, prompts, answers, strict=True):
            earlier = samples[i].answer_spans if i in samples else []
            # The template writes earlier turns anew; spans of them hold where its text begins as it did before.
            kept = earlier if i in samples and prompt[: len(samples[i].input_ids)] == samples[i].input_ids else []
            spans = [*kept, (len(prompt), len(prompt) + len(answer))]
            samples[i] = Sample(i, prompt + answer, spans)
            text = tokenizer.decode(answer, skip_special_tokens=True)
            messages[i].append({"role": "assistant", "content": text})
    return list(samples.values())


def _encode(tokenizer, messages: list[dict], chat_template: bool) -> list[int]:
    if not chat_template:
        return tokenizer("\n".join(message["content"] for message in messages)).input_ids
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def _generate(target, tokenizer, prompts: list[list[int]], settings: dict) -> list[list[int]]:
    """Answers without padding, with the token that ended each."""
    width = max(map(len, prompts))
    eos = settings.get("eos_token_id", target.generation_config.eos_token_id)
    stops = set(eos if isinstance(eos, list) else [eos]) - {None}
    pad = next(iter(stops), 0)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=target.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=target.device)
    output = target.generate(ids, attention_mask=mask, pad_token_id=pad, **settings)[:, width:].tolist()
    return [_up_to_stop(answer, stops) for answer in output]


def _up_to_stop(answer: list[int], stops: set[int]) -> list[int]:
    for position, token in enumerate(answer):
        if token in stops:
            return answer[: position + 1]
    return answer


def _end_of_cut_line(file: Path) -> str:
    """A line break where a kill left the last line without one."""
    with file.open("rb") as content:
        if content.seek(0, 2) == 0:
            return ""
        content.seek(-1, 2)
        return "" if content.read() == b"\n" else "\n"
