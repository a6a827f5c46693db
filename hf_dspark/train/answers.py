"""On-policy training text: the target answers the prompts itself, in batches of plain generate(). Resumable."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation as token ids; the draft is trained on the spans that the target wrote."""

    index: int  # of its conversation
    input_ids: list[int]
    answer_spans: list[tuple[int, int]]  # [start, stop) of each answer


def write_answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[str]],
    file: Path,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    chat_template: bool = True,
    seed: int = 0,
    generation: dict | None = None,
) -> list[Sample]:
    """Let the target answer every turn of `conversations`; samples are appended to `file` batch by batch.

    What `file` already holds is not written again, and a batch is seeded by its own number, so an interrupted run
    goes on to the same file. Sampling follows the target's generation config, or `generation` where given.
    """
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(conversations)), key=lambda i: (sum(map(len, conversations[i])), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    done = {sample.index for sample in read_samples(file)} if file.exists() else set()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out, tqdm(total=len(order), initial=len(done), desc="answers") as bar:
        out.write(_end_of_cut_line(file))
        for number, batch in enumerate(batches):
            if done.issuperset(batch):
                continue
            torch.manual_seed(seed + number)
            settings = {"max_new_tokens": max_new_tokens, **(generation or {})}
            samples = _answer_batch(target, tokenizer, conversations, batch, chat_template, settings)
            # A batch is written whole and at once: a kill leaves complete lines, and no part of a batch is lost.
            out.write("".join(json.dumps(asdict(s)) + "\n" for s in samples if s.index not in done))
            out.flush()
            bar.update(len(batch))
    return sorted(read_samples(file), key=lambda sample: sample.index)


def read_samples(file: Path) -> Iterator[Sample]:
    """The samples of a file that `write_answers` wrote; a last line cut off by a kill is left out."""
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield Sample(row["index"], row["input_ids"], [tuple(span) for span in row["answer_spans"]])


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
