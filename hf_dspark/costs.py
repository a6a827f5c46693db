"""Measuring a `CostTable`: what forwards of the target and blocks of the draft take on this machine, and keeping it.

Timed is what a round runs, after a context of random tokens; not the acceptance, nor what sampling adds to drafting.
Tables are kept in a cache folder of the user's, one for each setting that moves the times.
"""

import hashlib
import json
import os
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from .attention_interface import block_attention_on
from .compat import CACHE
from .draft import draft_block
from .features import FeatureTap
from .rollback import Rewinder, recording_past, why_not_reversible
from .schedule import CostTable
from .state import DecodeState
from .verify import verify_block

logger = logging.get_logger(__name__)


@torch.no_grad()
def profile_costs(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    *,
    max_tokens: int | None = None,
    batch_size: int = 1,
    prompt_length: int = 256,
    repeats: int = 15,
) -> CostTable:
    """Time the target's forwards over 1 to `max_tokens` tokens, and the draft's blocks.

    Args:
        max_tokens: default is room for whole blocks, `batch_size` * (block size + 1).
        batch_size: requests that will run together. B tokens are those of min(B, batch_size) requests.
        prompt_length: tokens of context a request has in the caches.
        repeats: all sizes are timed in turn, so often, and the shortest time of each counts: other work on the machine
            only adds to it, and a load that comes and goes does not bend the curve.

    Uses as many threads as PyTorch is set to. Raises ValueError for sizes that cannot be, and for a target whose cache
    cannot be rolled back.
    """
    max_tokens = _checked_max_tokens(draft, max_tokens, batch_size)
    if prompt_length < 1 or repeats < 1:
        raise ValueError(f"`prompt_length` and `repeats` must be at least 1, got {prompt_length} and {repeats}.")
    draft.bind_target(target)
    sizes = _sizes(max_tokens, batch_size)
    with ExitStack() as stack:
        # Forwards of the rounds attend as they do there.
        stack.enter_context(block_attention_on(target, draft, attention_mask=None, output_attentions=False))
        bench = {rows: _Bench(target, draft, rows, prompt_length, stack) for rows in {rows for rows, _ in sizes}}
        runs = {("target", rows * width): (bench[rows].verify, width) for rows, width in sizes}
        runs |= {("draft", rows): (bench[rows].draft_block, None) for rows in sorted(bench)}
        for run, argument in runs.values():  # the first run of a size pays for lazy set-up
            run(argument)
        turns = [{key: run(argument) for key, (run, argument) in runs.items()} for _ in range(repeats)]
    # Ratios of two sizes spread 0.01 between measurements on a busy machine; of medians, also of paired ratios, 0.1.
    seconds = {key: min(turn[key] for turn in turns) for key in runs}
    of_target = {count: value for (model, count), value in seconds.items() if model == "target"}
    of_draft = {count: value for (model, count), value in seconds.items() if model == "draft"}
    return CostTable(
        sample_batch_tokens=list(of_target),
        sample_steps_per_sec=[1 / value for value in of_target.values()],
        max_batch_tokens=max_tokens,
        sample_draft_requests=list(of_draft),
        sample_draft_seconds=list(of_draft.values()),
    )


def load_or_profile(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    *,
    max_tokens: int | None = None,
    batch_size: int = 1,
    prompt_length: int = 256,
    repeats: int = 15,
    refresh: bool = False,
) -> CostTable:
    """The table of these two models as they are set up here: from the user's cache, or measured and put there.

    `refresh` measures in any case. The other arguments are those of `profile_costs`.
    """
    max_tokens = _checked_max_tokens(draft, max_tokens, batch_size)
    settings = {"max_tokens": max_tokens, "batch_size": batch_size, "prompt_length": prompt_length}
    measured_on = {**describe_setup(target, draft), **settings}
    path = _cache_path(measured_on)
    if not refresh and (table := _read(path, measured_on)) is not None:
        return table
    table = profile_costs(target, draft, repeats=repeats, **settings)
    try:
        _write(path, json.loads(table.to_json()) | {"measured_on": measured_on})
    except OSError as error:
        logger.warning_once(f"The cost table cannot be kept in {path.parent}, so it will be measured again: {error}")
    return table


def describe_setup(target: PreTrainedModel, draft: PreTrainedModel) -> dict[str, Any]:
    """All that moves the times of a round: models, device, dtype, attention, threads and versions."""
    device = target.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()} cores"
    return {
        "target": target.config.name_or_path or type(target).__name__,
        "target_parameters": target.num_parameters(),
        "draft": draft.config.name_or_path or type(draft).__name__,
        "draft_parameters": draft.num_parameters(),
        "block_size": draft.config.block_size,
        "device": name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "draft_dtype": str(draft.dtype).removeprefix("torch."),
        "attention": target.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


class _Bench:
    """Both models after a context of `num_rows` requests; a timed run leaves the target's cache as it was."""

    def __init__(self, target, draft, num_rows: int, prompt_length: int, stack: ExitStack):
        self._target, self._draft = target, draft
        generator = torch.Generator().manual_seed(num_rows)
        vocab_size = target.config.get_text_config(decoder=True).vocab_size
        shape = (num_rows, prompt_length + 1)
        input_ids = torch.randint(vocab_size, shape, generator=generator).to(target.device)
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        self._tap = stack.enter_context(FeatureTap(target, draft.config.target_layer_ids))
        kwargs = {CACHE: cache, "use_cache": True}
        mask = torch.ones_like(input_ids)
        outputs = target(input_ids[:, :-1], attention_mask=mask[:, :-1], **kwargs, **self._tap.forward_kwargs)
        if (reason := why_not_reversible(target, cache, before_prefill=False)) is not None:
            raise ValueError(f"This target's forwards cannot be timed, for its cache cannot be rolled back: {reason}.")
        stack.enter_context(recording_past(cache))
        self._rewinder = Rewinder(cache)
        self._state = DecodeState(input_ids, {**kwargs, "attention_mask": mask}, cache_length=prompt_length)
        self._draft_cache = draft.new_cache()
        window = draft.context_window or prompt_length
        features = self._tap.take(outputs)[:, -window:].to(draft.device)
        self._read_by_draft(features)
        # About as many new positions as a round commits. The draft's cache grows by them, which weighs nothing.
        self._features = features[:, : draft.config.block_size // 2 + 1]

    def verify(self, width: int) -> float:
        """Seconds of a forward over the anchor and `width` - 1 drafted tokens of each request."""
        draft_ids = self._state.input_ids[:, :1].expand(-1, width - 1)
        start = _now(self._target.device)
        self._rewinder.before_forward()
        verification = verify_block(self._target, self._state, draft_ids, self._tap)
        seconds = _now(self._target.device) - start
        self._tap.take(verification.outputs)  # what hooks captured is not kept
        self._rewinder.keep(0, width)
        return seconds

    def draft_block(self, _: None) -> float:
        """Seconds of drafting one block for each request."""
        start = _now(self._draft.device)
        self._read_by_draft(self._features)
        return _now(self._draft.device) - start

    def _read_by_draft(self, features: torch.Tensor) -> None:
        anchor_ids = self._state.input_ids[:, -1].to(self._draft.device)
        draft_block(self._draft, features, anchor_ids, self._draft_cache)


def _checked_max_tokens(draft: PreTrainedModel, max_tokens: int | None, batch_size: int) -> int:
    if max_tokens is None:
        max_tokens = batch_size * (draft.config.block_size + 1)
    if not 1 <= batch_size <= max_tokens:
        raise ValueError(
            "`max_tokens` must be at least `batch_size`, one token a request, and that at least 1, got "
            f"{max_tokens} and {batch_size}."
        )
    return max_tokens


def _sizes(max_tokens: int, batch_size: int) -> list[tuple[int, int]]:
    """Shapes (requests, tokens of each) to be timed, by rising number of tokens: each up to 8, then every 5 / 4."""
    rows = 1
    sizes = []
    while rows < batch_size:
        sizes.append((rows, 1))
        rows *= 2
    width, last = 1, max_tokens // batch_size
    while width < last:
        sizes.append((batch_size, width))
        width += max(1, width // 4)
    return [*sizes, (batch_size, last)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cache_path(measured_on: dict[str, Any]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dspark" / "costs"
    digest = hashlib.sha256(json.dumps(measured_on, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "_", Path(measured_on["target"]).name)
    return folder / f"{name}-{digest}.json"


def _read(path: Path, measured_on: dict[str, Any]) -> CostTable | None:
    """The table in `path`; None where there is none, a damaged one or another setting's."""
    try:
        text = path.read_text(encoding="utf-8")
        table = CostTable.from_json(text)
    except (OSError, ValueError):
        return None
    return table if json.loads(text).get("measured_on") == measured_on else None


def _write(path: Path, fields: dict[str, Any]) -> None:
    """Write beside `path` and rename: no process ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
