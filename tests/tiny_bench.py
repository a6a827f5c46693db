"""The JSON of a benchmark as `hf-dspark bench` writes it, with figures made up so that each is recognised."""

from typing import Any


def bench_json(draft: str = "tiny_draft", *, tau: float = 3.217, median: float = 1.8431, **fields: Any) -> dict:
    """A greedy benchmark of one draft; `fields` replace what stands at the top."""
    return {
        "versions": {"hf_dspark": "0.9.1", "torch": "2.98.7", "transformers": "5.76.5", "python": "3.54.3"},
        "device": "cpu (Made-up 9000, AVX512)",
        "dtype": "bfloat16",
        "threads": 7,
        "git_sha": "c0ffee",
        "command": f"hf-dspark bench --target t --draft {draft} --prompts gsm8k.jsonl",
        "prompts": {"file": "gsm8k.jsonl", "number": 23},
        "arms": {
            "plain": _arm(1.0, 1.0, 41.26, identical=[23, 23]),
            "prompt_lookup": _arm(1.337, 1.2178, 50.31, identical=[22, 23]),
            f"{draft}@transformers": _arm(tau, 1.5119, 62.38, acceptance=[0.8312, 0.7123, 0.6512], identical=[19, 23]),
            draft: _arm(tau, median, 76.04, acceptance=[0.8312, 0.7123, None], identical=[17, 23]),
        },
        **fields,
    }


def _arm(tau: float, median: float, speed: float, *, acceptance: list | None = None, identical: list) -> dict:
    return {
        "tau": tau,
        "acceptance_at": acceptance,
        "survival_at": None if acceptance is None else [0.83, 0.59, 0.38],
        "verify_rate": None if acceptance is None else 0.402,
        "tokens_per_second": speed,
        "ratio_to_plain": {"median": median, "p25": 0.9 * median, "p75": 1.1 * median},
        "identical": identical,
    }
