"""Run by test_train.py, alone or under torchrun: one step's gradients, saved by the first process."""

import os
import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_dspark import DSparkDraftModel
from hf_dspark.train.answers import Sample
from hf_dspark.train.config import TrainConfig
from hf_dspark.train.states import StateSource
from hf_dspark.train.step import TrainingStep
from hf_dspark.train.target import FrozenTarget
from hf_dspark.train.trainer import _Run


def main(target_folder: str, draft_folder: str, output: str) -> None:
    torch.set_num_threads(1)
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    draft = DSparkDraftModel.from_pretrained(draft_folder, target=target, dtype=torch.float32).train()
    samples = []
    for index in range(4):  # of other lengths, so that other rows are supervised in each process
        ids = torch.randint(0, 200, (18 + 5 * index,), generator=torch.Generator().manual_seed(index)).tolist()
        samples.append(Sample(index, ids, [(5, len(ids))]))
    config = TrainConfig(target="", prompts=["-"], output=output, batch_size=4, num_anchors=6, mixed_precision="no")
    frozen = FrozenTarget(target, draft.config.target_layer_ids)
    accelerator = Accelerator(cpu=True)
    run = _Run(accelerator, config, draft, StateSource(frozen, None, []), TrainingStep(draft, frozen, chunk_rows=16))
    for stepped in (*run.optimizers, *run.schedules):
        stepped.step = lambda: None
    run.step.zero_grad = lambda: None
    run.config.max_grad_norm = 1e9
    loss = run.step_once(0, samples)["loss"]
    if accelerator.is_main_process:
        gradients = {name: p.grad.contiguous() for name, p in draft.named_parameters() if p.grad is not None}
        save_file(gradients | {"loss": torch.tensor(loss)}, output)
        print(accelerator.num_processes)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # a thread of torch's now and then aborts a process of a group while it ends, when all is done
