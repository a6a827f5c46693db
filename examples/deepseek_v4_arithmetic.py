"""The model cards of DeepSeek-V4's drafts: every figure is computed from fields of config.json, none is measured.

python examples/deepseek_v4_arithmetic.py      writes model_cards/deepseek_v4_*_dspark.md
"""

import json
import math
import re
import textwrap
from pathlib import Path

from hf_dspark.checkpoint import DeepseekV4Checkpoint
from hf_dspark.dialects_deepseek_v4 import stored_tensors

CARDS = Path(__file__).parent.parent / "model_cards"
STAGES = 3  # num_nextn_predict_layers of config.json says 1
# config.json of DeepSeek-V4-Flash-0731 and DeepSeek-V4-Pro-0813, as a third-party record has them.
COMMON = json.loads("""{
    "model_type": "deepseek_v4", "vocab_size": 129280, "head_dim": 512, "qk_rope_head_dim": 64, "o_lora_rank": 1024,
    "num_experts_per_tok": 6, "num_hash_layers": 3, "scoring_func": "sqrtsoftplus", "swiglu_limit": 10.0,
    "hidden_act": "silu", "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
    "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128, "rope_theta": 10000,
    "max_position_embeddings": 1048576, "dspark_block_size": 5, "dspark_noise_token_id": 128799,
    "expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}""")
FLASH = COMMON | json.loads("""{
    "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "q_lora_rank": 1024, "o_groups": 8,
    "n_routed_experts": 256, "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5,
    "dspark_target_layer_ids": [40, 41, 42], "dspark_markov_rank": 256}""")
PRO = COMMON | json.loads("""{
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
    "n_routed_experts": 384, "moe_intermediate_size": 3072, "routed_scaling_factor": 2.5,
    "dspark_target_layer_ids": [58, 59, 60], "dspark_markov_rank": 512}""")
FLASH["compress_ratios"] = [0, 0] + [4, 128] * 20 + [4] + [0] * STAGES
PRO["compress_ratios"] = [128, 128] + [4, 128] * 29 + [4] + [0] * STAGES
# Of one stored element: its bytes, its bytes in bfloat16, its values. A byte of fp4 holds two.
STORED = {"bf16": 2, "f32": 4, "fp8": 1, "fp4": 1, "e8m0": 1, "i64": 8}
BF16 = STORED | {"fp8": 2, "fp4": 4, "e8m0": 0}
VALUES = {"bf16": 1, "f32": 1, "fp8": 1, "fp4": 2, "e8m0": 0, "i64": 0}
EXPERTS, EMBED, HEAD = ".ffn.experts.", "embed.weight", "head.weight"
PACKED, DEQUANTIZED = "packed", "dequantized"
NUM_GPUS = 8
GPUS = {"H100 (80 GB)": 80e9, "H200 (141 GB)": 141e9, "B200 (192 GB)": 192e9}  # nominal
CONTEXT = 2**17
RESERVE = 4e9  # assumed: CUDA context, kernels, activations
# Share of drafted tokens that survive at each of V4's positions, from one report on a third-party fork.
SURVIVAL = (0.58, 0.45, 0.32, 0.24, 0.16)
# Share of all drafted tokens that is accepted, from the paper; of drafts for dense targets with blocks of seven.
SHARES = {"chat": 0.457, "code": 0.676, "math": 0.769}


class Release:
    """Tensors of draft and target, name -> (kind, shape), and the draft's bytes as it is loaded."""

    def __init__(self, name, config, date, num_shards, gain):
        self.name, self.config, self.date, self.num_shards, self.gain = name, config, date, num_shards, gain
        self.repo = f"deepseek-ai/DeepSeek-V4-{name}-DSpark"
        self.draft, self.target = stored_tensors(config, STAGES), target_tensors(config)
        self.ratios = config["compress_ratios"][: config["num_hidden_layers"]]
        held = DeepseekV4Checkpoint(config, {}, STAGES)
        self.held = {form: held.with_experts(is_packed=form == PACKED).num_bytes for form in (PACKED, DEQUANTIZED)}
        self.form = DEQUANTIZED if fullest_gpu(self, DEQUANTIZED, 1) <= GPUS["H200 (141 GB)"] else PACKED


def target_tensors(config):
    """The target's tensors. A layer has what a stage of the draft has, and compressors."""
    hidden, vocab, streams = config["hidden_size"], config["vocab_size"], config["hc_mult"]
    tensors = {EMBED: ("bf16", (vocab, hidden)), HEAD: ("bf16", (vocab, hidden)), "norm.weight": ("bf16", (hidden,))}
    tensors |= {"hc_head_fn": ("f32", (streams, streams * hidden)), "hc_head_base": ("f32", (streams,))}
    tensors |= {"hc_head_scale": ("f32", (1,))}
    stage = [item for item in stored_tensors(config, STAGES).items() if item[0].startswith("mtp.1.")]
    for layer in range(config["num_hidden_layers"]):
        own = {name.removeprefix("mtp.1."): entry for name, entry in stage}
        own |= _compressors(config, config["compress_ratios"][layer])
        if layer < config["num_hash_layers"]:  # a table names each token's experts
            del own["ffn.gate.bias"]
            own["ffn.gate.tid2eid"] = ("i64", (vocab, config["num_experts_per_tok"]))
        tensors |= {f"layers.{layer}.{name}": entry for name, entry in own.items()}
    return tensors


def _compressors(config, ratio):
    hidden, series = config["hidden_size"], 2 if ratio == 4 else 1  # windows of ratio 4 overlap
    widths = {"attn.compressor": config["head_dim"]} if ratio else {}
    tensors = {}
    if ratio == 4:
        widths["attn.indexer.compressor"] = config["index_head_dim"]
        rows, columns = config["index_n_heads"] * config["index_head_dim"], config["q_lora_rank"]
        tensors["attn.indexer.wq_b.weight"] = ("fp8", (rows, columns))
        tensors["attn.indexer.wq_b.scale"] = ("e8m0", (rows // 128, columns // 128))
        tensors["attn.indexer.weights_proj.weight"] = ("bf16", (config["index_n_heads"], hidden))
    for name, width in widths.items():
        tensors[f"{name}.wkv.weight"] = tensors[f"{name}.wgate.weight"] = ("bf16", (series * width, hidden))
        tensors[f"{name}.ape"], tensors[f"{name}.norm.weight"] = ("f32", (ratio, series * width)), ("bf16", (width,))
    return tensors


def size(tensors, widths=STORED, part=""):
    """Bytes (or values) of the tensors whose name contains `part`."""
    return sum(widths[kind] * math.prod(shape) for name, (kind, shape) in tensors.items() if part in name)


def cache_bytes(config, num_tokens):
    """The target's cache of one sequence in bfloat16: window, pooled entries and, at most, the open windows."""
    values, window = 0, min(config["sliding_window"], num_tokens) * config["head_dim"]
    for ratio in config["compress_ratios"][: config["num_hidden_layers"]]:
        width = config["head_dim"] + (config["index_head_dim"] if ratio == 4 else 0)
        values += window if ratio else 2 * window  # keys are values, but layers without compression store both
        if ratio:
            values += num_tokens // ratio * width + (ratio - 1) * width * (4 if ratio == 4 else 2)
    return 2 * values


def attention_bytes(config, num_tokens):
    """What eager attention copies in a layer of ratio 4: keys and values, once for every head."""
    keys = config["sliding_window"] + num_tokens // 4
    return 2 * 2 * config["num_attention_heads"] * keys * config["head_dim"]


def distinct_experts(config, num_tokens):
    """Experts of a layer that `num_tokens` hit where each picks k of E evenly and on its own: E (1 - (1 - k/E)^n)."""
    experts, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    return experts * (1 - (1 - chosen / experts) ** num_tokens)


def target_reads(release, num_tokens, ranks=1):
    """Bytes of weights that a forward of `num_tokens` reads; ranks share the experts that are hit, and lm_head."""
    target, config = release.target, release.config
    experts, head = size(target, part=EXPERTS), size(target, part=HEAD)
    dense = size(target) - experts - head - size(target, part=EMBED) - size(target, part="tid2eid")
    return dense + (head + experts * distinct_experts(config, num_tokens) / config["n_routed_experts"]) / ranks


def draft_reads(release, form, ranks=1):
    """Bytes moved to draft a block: stages and lm_head once, the Markov head's second matrix for every token."""
    draft, rows = release.draft, release.config["dspark_block_size"]
    experts = size(draft, BF16, EXPERTS)
    dense = size(draft, BF16) - experts - size(draft, part="markov_w1") + (rows - 1) * size(draft, part="markov_w2")
    if form == PACKED:  # what is hit is read, written in bfloat16 and read again
        experts = size(draft, part=EXPERTS) + 2 * experts
    hit = distinct_experts(release.config, rows) / release.config["n_routed_experts"]
    return dense + size(release.target, part=HEAD) / ranks + experts * hit


def round_ratio(release, verified, ranks):
    """Bytes of a round over those of a plain forward of one token."""
    num_bytes = draft_reads(release, release.form, ranks) + target_reads(release, verified + 1, ranks)
    return num_bytes / target_reads(release, 1, ranks)


def fullest_gpu(release, form, ranks):
    """Bytes on the fullest of eight GPUs: the best spread of whole layers, or every rank's share of the experts."""
    layers, num_others = release.config["num_hidden_layers"], NUM_GPUS - 1
    extra = cache_bytes(release.config, CONTEXT) + attention_bytes(release.config, CONTEXT) + RESERVE
    if ranks > 1:
        return rank_bytes(release) + release.held[form] + extra
    layer = max(size(release.target, part=f"layers.{i}.") for i in range(4))
    spreads = ((math.ceil((layers - last) / num_others) * layer, last * layer) for last in range(layers))
    fullest = min(max(others, last + release.held[form]) for others, last in spreads)
    return fullest + size(release.target, part=EMBED) + extra  # lm_head, on the last one, is as large


def rank_bytes(release):
    """Bytes of the target on each of eight ranks."""
    split = sum(size(release.target, part=part) for part in (EXPERTS, EMBED, HEAD))
    return size(release.target) - split * (NUM_GPUS - 1) / NUM_GPUS


def memory_table(release):
    rows = []
    for layout, ranks in (("one process", 1), ("a process a GPU", NUM_GPUS)):
        for form in release.held:
            needed = fullest_gpu(release, form, ranks)
            verdicts = ["fits" if needed <= memory else "does not fit" for memory in GPUS.values()]
            rows.append([layout, form, gb(needed), *verdicts])
    return table(["layout", "draft's experts", "fullest GPU", *(f"{NUM_GPUS} x {gpu}" for gpu in GPUS)], rows)


def rounds_table(release):
    block = release.config["dspark_block_size"]
    taus = [(verified, "fork", 1 + sum(SURVIVAL[:verified])) for verified in range(1, block + 1)]
    taus += [(block, f"paper, {kind}: {share:.1%} accepted", 1 + block * share) for kind, share in SHARES.items()]
    rows = []
    for verified, source, tau in taus:
        ratios = [round_ratio(release, verified, ranks) for ranks in (1, NUM_GPUS)]
        cells = [cell for ratio in ratios for cell in (f"{ratio:.2f}", f"{tau / ratio:.2f}x")]
        rows.append([verified, source, f"{tau:.2f}", f"{distinct_experts(release.config, verified + 1):.1f}", *cells])
    columns = [f"{layout}: {what}" for layout in ("one process", f"{NUM_GPUS} ranks") for what in ("ratio", "bound")]
    return table(["drafts verified", "acceptance", "tau", "experts hit", *columns], rows)


def table(headings, rows):
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def gb(num_bytes):
    return f"{num_bytes / 1e9:.1f} GB"


def gib(num_bytes):
    return f"{gb(num_bytes)} ({num_bytes / 2**30:.2f} GiB)"


def render(release):
    """The card. Prose is wrapped; code, tables, headings and lists stay as they are."""
    parts = (_head, _loading, _draft, _memory, _ranks, _expectation)
    text = "\n\n".join(part(release) for part in parts) + LIMITS
    pieces = text.split("```")
    for i in range(0, len(pieces), 2):  # between blocks of code
        blocks = pieces[i].split("\n\n")
        pieces[i] = "\n\n".join(block if block.lstrip()[:1] in "#|-" else _wrapped(block) for block in blocks)
    return "```".join(pieces)


def _wrapped(block):
    block = re.sub("`.+?`", lambda code: code[0].replace(" ", "\0"), " ".join(block.split()))
    return textwrap.fill(block, 119, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def _head(release):
    device_map = 'device_map = "auto"'
    if release.form == PACKED:  # "auto" spreads the layers evenly and leaves no room beside lm_head
        layers, last = release.config["num_hidden_layers"], NUM_GPUS - 1
        device_map = f"""\
device_map = {{f"model.layers.{{i}}": i // {math.ceil(layers / NUM_GPUS)} for i in range({layers})}}
device_map |= {{"model.embed_tokens": 0, "model.rotary_emb": 0}}
device_map |= {{"model.norm": {last}, "model.hc_head": {last}, "lm_head": {last}}}"""
    return f"""\
# {release.repo}

DeepSeek's DSpark draft of DeepSeek-V4-{release.name}. It lies in the target's own files, as `mtp.*` tensors, and is
loaded from there. The weights are DeepSeek's, under their licence; they are not part of this repository.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_dspark import DSparkDraftModel

NAME = "{release.repo}"
{device_map}
target = AutoModelForCausalLM.from_pretrained(NAME, dtype="auto", device_map=device_map)
draft = DSparkDraftModel.from_pretrained(NAME, target=target, experts="{release.form}")
tokenizer = AutoTokenizer.from_pretrained(NAME)
inputs = tokenizer("The capital of France is", return_tensors="pt").to(target.device)
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0]))
print(draft.last_stats)
```"""


def _loading(release):
    num_bytes, num_tensors = size(release.draft) + size(release.target), len(release.draft) + len(release.target)
    remark = ""
    if release.form == PACKED:
        remark = f"""The device map is for {NUM_GPUS} GPUs of 141 GB or more: `device_map="auto"` spreads the layers
evenly, and on 141 GB nothing is left for the draft, which lies beside lm_head."""
    return f"""\
That is one process for all GPUs. {remark} With too few of them, `device_map="auto"` leaves layers in CPU memory or,
with `offload_folder=`, on the disk; they cross the bus whole in every forward, as many bytes for 6 tokens as for 1.

`experts="packed"` keeps the draft's routed experts in fp4 and expands those that a block hits; `"dequantized"` holds
all in bfloat16; left out, it is the latter if that fits into the free memory. The draft alone in a folder:
`hf-dspark convert {release.repo} --to dspark --output FOLDER`.

**Every figure here is computed, none is measured**: by `python examples/deepseek_v4_arithmetic.py`, from config.json
of DeepSeek-V4-{release.name}-{release.date} as a third-party record has it. No official file was seen and nothing was
run on the real checkpoint; that the -DSpark repository has the structure of {release.date} is assumed. The list of
tensors behind the figures has as many tensors ({num_tensors:,}) and bytes ({num_bytes:,}) as are published for
{release.date}. GB is 10^9 bytes, GiB 2^30."""


def _draft(release):
    config, draft, block = release.config, release.draft, release.config["dspark_block_size"]
    num_bytes, total = size(draft), size(draft) + size(release.target)
    idle = size(draft, VALUES, EXPERTS) * (1 - config["num_experts_per_tok"] / config["n_routed_experts"])
    active = size(draft, VALUES) - idle - size(draft, VALUES, "markov") - size(draft, VALUES, "confidence")
    largest = config["n_routed_experts"] * config["moe_intermediate_size"] * config["hidden_size"]
    window, width = config["sliding_window"], config["head_dim"]
    rows = [
        ["stages", f"{STAGES} layers like the target's: {config['n_routed_experts']} experts, 6 chosen, 1 shared"],
        ["reads", f"the target's layers {config['dspark_target_layer_ids']} (from 0), mean of their 4 streams"],
        [
            "block",
            f"{block} tokens, so that the target verifies {block + 1}; noise id {config['dspark_noise_token_id']}",
        ],
        [
            "heads",
            f"vanilla Markov of rank {config['dspark_markov_rank']}, confidence; embedding, lm_head: the target's",
        ],
        ["in the files", f"{len(draft):,} tensors, {gib(num_bytes)}: experts fp4, other matrices fp8"],
        ["parameters", f"{size(draft, VALUES) / 1e9:.2f} billion; {active / 1e9:.2f} used at a position, heads apart"],
        ["loaded, packed", f"{gib(release.held[PACKED])}: experts fp4, the rest bfloat16"],
        ["loaded, dequantized", gib(release.held[DEQUANTIZED])],
        ["cache", f"keys and values, {STAGES} x {window} rows x {width}: {8 * STAGES * window * width // 2:,} bytes"],
    ]
    return f"""\
## The draft

{table(["", ""], rows)}

Fetched are config.json, the index and, whole, the shards that hold `mtp.*`: at least {num_bytes:,} of {total:,} bytes
({num_bytes / total:.1%}), so at least {math.ceil(num_bytes * release.num_shards / total)} of {release.num_shards}
shards if these are equally large. How the tensors lie in them was not seen. What the target has put into the cache is
not fetched again. While loading, each process also holds the largest tensor in host memory: {gb(largest)} packed,
{gb(4 * largest)} dequantised."""


def _memory(release):
    config, target, count = release.config, release.target, release.ratios.count
    width, index_width, heads = config["head_dim"], config["index_head_dim"], config["num_attention_heads"]
    slope = 2 * (count(4) * (width + index_width) // 4 + count(128) * width // 128)
    chunk = 2 * heads * 512 * (config["sliding_window"] + 512 + CONTEXT // 4)
    kinds = [
        (count(0), f"have only the window of {config['sliding_window']}"),
        (count(4), f"pool 4 tokens into an entry ({width} wide, and {index_width} for the indexer)"),
        (count(128), "pool 128"),
    ]
    return f"""\
## Memory

The target has {size(target):,} bytes ({size(target, VALUES) / 1e9:.1f} billion parameters):
{gb(size(target, part=EXPERTS))} of routed experts, {gb(size(target) - size(target, part=EXPERTS))} of everything else.
A CPU, or a GPU without fp8 (compute capability below 8.9), gets it in bfloat16: {gb(size(target, BF16))}.

The target's cache of one sequence, by layers: {", ".join(f"{n} {what}" for n, what in kinds if n)}. That is
{slope:,} bytes a token: {gb(cache_bytes(config, CONTEXT))} at 128k tokens, {gb(cache_bytes(config, 2**20))} at 1M.
Eager attention copies the keys and values of a layer for every head: {gb(attention_bytes(config, CONTEXT))} at 128k,
{gb(attention_bytes(config, 2**20))} at 1M, one layer at a time. A copy of a layer's scores takes
{gb(2 * heads * 2**13 * (2**13 + 2**11))} for a prompt of 8192 tokens read at once, {gb(chunk)} at 128k read in pieces
(`prefill_chunk_size=512` of generate()); several are alive.

The fullest of {NUM_GPUS} GPUs (nominal sizes), with cache and copies at 128k tokens, and {gb(RESERVE)} assumed for all
else:

{memory_table(release)}

One process: whole layers, spread as well as can be, and the draft beside lm_head. A process a GPU: transformers splits
the routed experts, embedding and lm_head; attention and shared experts are whole on every rank, which has
{gb(rank_bytes(release))} of the target, and the whole draft."""


def _ranks(release):
    return f"""\
## A process a GPU

```python
import os
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DistributedConfig
from hf_dspark import DSparkDraftModel

NAME = "{release.repo}"
ranks = int(os.environ["WORLD_SIZE"])
split = DistributedConfig(tp_size=ranks, ep_size=ranks)
target = AutoModelForCausalLM.from_pretrained(NAME, dtype="auto", distributed_config=split)
draft = DSparkDraftModel.from_pretrained(NAME, target=target, experts="{release.form}")
tokenizer = AutoTokenizer.from_pretrained(NAME)
inputs = tokenizer("The capital of France is", return_tensors="pt").to(target.device)
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=64, do_sample=False)
if torch.distributed.get_rank() == 0:
    print(tokenizer.decode(output[0]))
    print(draft.last_stats)
torch.distributed.destroy_process_group()
```

`torchrun --standalone --nproc-per-node {NUM_GPUS} script.py`, with transformers 5.24; every process goes on with the
first one's tokens. Run on two CPU processes with a tiny checkpoint of this format, where the output is that of plain
greedy decoding in fp32; never on GPUs. `enable_expert_parallel=True` is deprecated, and with it loading raises
ValueError."""


def _expectation(release):
    other = DEQUANTIZED if release.form == PACKED else PACKED
    traffic = 2 * release.ratios.count(4) * attention_bytes(release.config, CONTEXT)
    return f"""\
## What to expect

tau is the number of tokens a round emits: 1 and the drafted tokens that survive. No tau of this draft was measured.
Fork, below: one report on a third-party fork, not checked, has {", ".join(map(str, SURVIVAL))} surviving at V4's
positions. Paper: the acceptance of the authors' drafts for dense targets (blocks of 7), as if each of V4's
{len(SURVIVAL)} tokens had it. For V4 itself the authors report {release.gain} more tokens a second and user than with
one-token MTP, in their own engine at equal throughput.

At batch 1 and with a short context, a forward reads weights. A token picks 6 of {release.config["n_routed_experts"]}
experts; n tokens hit `E (1 - (1 - 6/E)^n)` if they pick evenly and independently. So verifying 6 tokens reads more
than a plain forward: {gb(target_reads(release, 6))} instead of {gb(target_reads(release, 1))}. Drafting moves
{gb(draft_reads(release, release.form))} with {release.form} experts, {gb(draft_reads(release, other))} with {other}
ones (a packed expert that is hit is read, written in bfloat16 and read again). Ratio: bytes of a round over those of a
plain forward, {release.form} experts; a round pays where tau is larger. Bound: tau over the ratio, the speed-up if
bandwidth alone counted. {NUM_GPUS} ranks: the bytes of one, experts hit evenly.

{rounds_table(release)}

Below 1x, bandwidth says that drafting does not pay; `draft.generation_config.num_assistant_tokens = 3` verifies fewer
tokens. The bound is no promise, nor a limit: tokens of one text may share experts, eager transformers at batch 1
probably spends more time on launches than on reading, and at 128k tokens the copies for attention move {gb(traffic)}
a forward, for 6 tokens as for 1."""


LIMITS = """

## Limits

- Nothing was run on the real checkpoint, and no official file was seen. Checked is the code, on tiny checkpoints of
  this format, against an independent implementation of what is published.
- One sequence at a time. DeepSeek-V4.1 is refused: its draft is of another architecture.
- The reference rounds keys and values to fp8; this is not simulated, so drafted tokens may differ at near-ties.
- transformers has only eager attention and a dynamic cache for this target. Its fp4 experts run on DeepGEMM on
  Blackwell with a process a GPU; Hopper, and one process with several GPUs, falls back to Triton. Both want the
  `kernels` package.
"""


def releases():
    return Release("Flash", FLASH, "0731", 48, "60 to 85 %"), Release("Pro", PRO, "0813", 66, "57 to 78 %")


if __name__ == "__main__":
    for release in releases():
        (CARDS / f"deepseek_v4_{release.name.lower()}_dspark.md").write_text(render(release), encoding="utf-8")
