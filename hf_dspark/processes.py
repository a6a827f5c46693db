"""The processes of `torchrun` or `accelerate launch` that share a data set; each has models of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

# A process may wait for the slowest one for as long as its share takes; one that dies ends the wait at once.
_PATIENCE = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among `world`, the first of which has `rank` 0."""

    rank: int
    world: int
    local_rank: int  # among those of this machine

    @classmethod
    def of_launcher(cls) -> "Processes":
        """As torchrun and accelerate say in the environment; one alone without them."""
        return cls(*(int(os.environ.get(name, default)) for name, default in _VARIABLES.items()))

    def share(self, num_rows: int) -> range:
        """Row i belongs to process i mod `world`."""
        return range(self.rank, num_rows, self.world)

    def device(self, asked: str) -> str:
        """For "auto" a GPU of its own for each of several processes; alone it would take all."""
        if asked != "auto" or self.world == 1 or not torch.cuda.is_available():
            return asked
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    @contextmanager
    def all_finished(self) -> Iterator[None]:
        """At its end all processes have come there."""
        if self.world == 1:
            yield
            return
        distributed.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield
            distributed.barrier()
        finally:
            distributed.destroy_process_group()


_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
