"""Run by test_train.py under torchrun: train() with its draft sharded by FSDP2, which accelerate offers on GPUs only.

fsdp_training.py TrainConfig-as-JSON
"""

import json
import os
import sys

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from hf_dspark.train import TrainConfig, train

_init = AcceleratorState.__init__


def _sharded(self, *args, **kwargs):
    """What accelerate sets up where it finds GPUs and examples/accelerate/fsdp.yaml."""
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    _init(self, *args, **kwargs)
    self.distributed_type = DistributedType.FSDP
    self.fsdp_plugin = plugin or FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["DraftDecoderLayer"],
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    AcceleratorState.__init__ = _sharded
    train(TrainConfig(**json.loads(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # a thread of torch's now and then aborts a process of a group while it ends, when all is done
