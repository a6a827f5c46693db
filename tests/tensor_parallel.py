"""Run by test_tensor_parallel.py under torchrun: every process generates with a seed of its own and writes what."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_dspark import ConfidenceThreshold, DSparkDraftModel


def main(target_folder: str, draft_folder: str, plan: str, prompt: str, output_folder: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    parallel = DistributedConfig(**json.loads(plan))
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32, distributed_config=parallel)
    draft = DSparkDraftModel.from_pretrained(draft_folder, target=target, dtype=torch.float32)
    found = {"is_sharded": sum(p.numel() for p in _local(target)) < target.num_parameters()}
    for name, schedule in (("whole block", None), ("by confidence", ConfidenceThreshold(0.5))):
        for law, do_sample in (("greedy", False), ("sampled", True)):
            torch.manual_seed(100 + rank)
            output = target.generate(
                torch.tensor([json.loads(prompt)]),
                assistant_model=draft,
                schedule=schedule,
                do_sample=do_sample,
                max_new_tokens=40,
                pad_token_id=0,
                return_dict_in_generate=True,
            )
            rounds = [[r.drafted, r.verified, r.accepted, r.emitted] for r in output.rounds]
            found[f"{law}, {name}"] = {"sequence": output.sequences[0].tolist(), "rounds": rounds}
    Path(output_folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # the other may still be receiving


def _local(target):
    return [p.to_local() if hasattr(p, "to_local") else p for p in target.parameters()]


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # a thread of torch's now and then aborts a process of a group while it ends, when all is done
