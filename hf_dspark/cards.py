"""Model cards from measured JSON: every figure in a card comes from `hf-dspark bench`, none is typed."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from .eval.benchmark import PLAIN, PROMPT_LOOKUP, STOCK_LOOP

_REQUIRED = ("base_model", "data", "steps")
_OPTIONAL = {"draft": None, "repo": None, "license": "mit", "tags": [], "details": {}, "limits": []}
_TAGS = ["dspark", "speculative-decoding", "draft-model"]

_CARD = """\
---
{front_matter}
---

# {name}

DSpark draft of {base_model}: speculative decoding inside transformers' `generate()`. The output stays the target's:
the same tokens when greedy in fp32, the same distribution when sampling.

```python
from transformers import AutoModelForCausalLM
from hf_dspark import DSparkDraftModel

target = AutoModelForCausalLM.from_pretrained("{base_model}", dtype="auto", device_map="auto")
draft = DSparkDraftModel.from_pretrained("{repo}", target=target)
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
```

## The draft

{about}

## Measured

tau is the mean number of tokens a round emits, the target's own (bonus) token included. Speed is tokens per second
against plain `generate()`, prompt by prompt: median (p25 to p75).

{results}

Acceptance of the drafted token at each position, given that all before it were accepted:

{acceptance}

## How it was measured

{conditions}

## Limits

{limits}

## Licence

{license}, for the draft's weights; the target has its own licence.
"""


def render_card(
    template_fields: Mapping[str, Any], bench_jsons: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> str:
    """A model card in markdown with YAML front matter.

    Args:
        template_fields: `base_model`, `data` (what it was trained on), `steps`; optional `draft` (which of the
            benchmarks' drafts), `repo` (its Hub name), `license`, `tags`, `details` (rows of the draft's table by
            label) and `limits` (sentences, beside those that follow from the figures).
        bench_jsons: contents of one or more files of `hf-dspark bench`.

    Raises ValueError for a field that is missing or unknown, and for a benchmark without the draft.
    """
    benches = [bench_jsons] if isinstance(bench_jsons, Mapping) else list(bench_jsons)
    fields = _checked_fields(template_fields)
    draft = fields["draft"] or _only_draft(benches)
    for bench in benches:
        if draft not in bench["arms"]:
            raise ValueError(f"A benchmark has no arm {draft!r}, only {sorted(bench['arms'])}. Give it as `draft`.")
    data = ModelCardData(
        license=fields["license"],
        base_model=fields["base_model"],
        library_name="transformers",
        tags=[*_TAGS, *fields["tags"]],
    )
    about = {"target": fields["base_model"], "trained on": fields["data"], "steps": fields["steps"]}
    return _CARD.format(
        front_matter=data.to_yaml(),
        name=draft,
        base_model=fields["base_model"],
        repo=fields["repo"] or draft,
        about=_table(["", ""], [[label, str(value)] for label, value in {**about, **fields["details"]}.items()]),
        results=_table(list(_result(benches[0], draft)), [list(_result(b, draft).values()) for b in benches]),
        acceptance=_acceptance(benches, draft),
        conditions="\n\n".join(map(_conditions, benches)),
        limits="\n".join(f"- {limit}" for limit in [*_measured_limits(benches, draft), *fields["limits"]]),
        license=fields["license"].upper(),
    )


def _checked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in _REQUIRED if name not in fields]
    unknown = sorted(set(fields) - set(_REQUIRED) - set(_OPTIONAL))
    if missing or unknown:
        raise ValueError(
            f"The card's fields lack {missing} and have the unknown {unknown}. Required are {list(_REQUIRED)}, "
            f"optional {list(_OPTIONAL)}."
        )
    return {**_OPTIONAL, **fields}


def _only_draft(benches: Sequence[Mapping[str, Any]]) -> str:
    arms = {name for bench in benches for name in bench["arms"]}
    drafts = sorted(name for name in arms - {PLAIN, PROMPT_LOOKUP} if not name.endswith(STOCK_LOOP))
    if len(drafts) != 1:
        raise ValueError(f"A card is of one draft, and the benchmarks have {drafts}. Name it in the field `draft`.")
    return drafts[0]


def _result(bench: Mapping[str, Any], draft: str) -> dict[str, str]:
    """A benchmark's row in the table of results, by heading."""
    arm, arms = bench["arms"][draft], bench["arms"]
    return {
        "prompts": _prompts(bench),
        "dtype": bench["dtype"],
        "tau": f"{arm['tau']:.2f}",
        "tokens/s": f"{arm['tokens_per_second']:.1f}",
        "plain": f"{arms[PLAIN]['tokens_per_second']:.1f}",
        "speed-up": _speed_up(arm),
        "prompt lookup": _speed_up(arms[PROMPT_LOOKUP]),
        "equal to plain": "sampled" if arm["identical"] is None else "{} of {}".format(*arm["identical"]),
    }


def _prompts(bench: Mapping[str, Any]) -> str:
    return f"{bench['prompts']['number']} of {bench['prompts']['file']}"


def _speed_up(arm: Mapping[str, Any]) -> str:
    return "{median:.2f}x ({p25:.2f} to {p75:.2f})".format(**arm["ratio_to_plain"])


def _acceptance(benches: Sequence[Mapping[str, Any]], draft: str) -> str:
    rates = [bench["arms"][draft]["acceptance_at"] for bench in benches]
    width = max(map(len, rates))
    rows = []
    for bench, of_bench in zip(benches, rates, strict=True):
        cells = ["" if rate is None else f"{rate:.2f}" for rate in of_bench]
        rows.append([_prompts(bench), bench["dtype"], *cells, *[""] * (width - len(cells))])
    return _table(["prompts", "dtype", *map(str, range(1, width + 1))], rows)


def _conditions(bench: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in bench["versions"].items())
    commit = f", commit {bench['git_sha']}" if bench["git_sha"] else ""
    facts = f"{bench['device']}, {bench['dtype']}, threads: {bench['threads']}; {versions}{commit}"
    return f"{_prompts(bench)}: {facts}\n\n```bash\n{bench['command']}\n```"


def _measured_limits(benches: Sequence[Mapping[str, Any]], draft: str) -> list[str]:
    """Where the figures say that the draft does not help, or that its text is another."""
    limits = ["Measured only on what the tables name; other text, hardware and dtypes have other figures."]
    for bench in benches:
        arm, where = bench["arms"][draft], f"{_prompts(bench)} ({bench['dtype']})"
        if arm["ratio_to_plain"]["median"] < 1:
            limits.append(f"Slower than plain generation on {where}: {_speed_up(arm)}.")
        if arm["identical"] is not None and arm["identical"][0] < arm["identical"][1]:
            different = arm["identical"][1] - arm["identical"][0]
            limits.append(
                f"{different} of {arm['identical'][1]} greedy texts differ from plain generation's on {where}: a "
                "block's forward rounds otherwise than a single token's."
            )
    return limits


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
