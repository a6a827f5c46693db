"""One decision a round for all processes that share a target (tensor or expert parallel): that of the first.

Processes that sample with other seeds, or round otherwise, would go on with other tokens: their forwards would have
other shapes, and the target's collectives between them would hang or mix up.
"""

from dataclasses import replace

import torch

from .compat import tensor_parallel_group
from .state import Decision, DraftBlock


class Agreement:
    """What a call's processes agree on; nothing is sent where the target lies in one process."""

    def __init__(self, target):
        self._group = tensor_parallel_group(target)

    @property
    def is_needed(self) -> bool:
        return self._group is not None

    def on_block(self, block: DraftBlock | None, verify_length: int) -> tuple[DraftBlock | None, int]:
        """The first process's drafted tokens, and how many of them are verified."""
        if self._group is None or block is None:
            return block, verify_length
        length = block.token_ids.new_tensor([[verify_length]])
        sent = self.of_first(torch.cat([length, block.token_ids], dim=1))
        # One more synchronisation a round, of processes that wait for each other anyway.
        return replace(block, token_ids=sent[:, 1:]), sent[:, 0].tolist()[0]

    def on_decision(self, decision: Decision, width: int) -> Decision:
        """The first process's decision; `width` is the number of verified tokens and one."""
        if self._group is None:
            return decision
        tokens = decision.emitted_ids
        counts = tokens.new_tensor([[tokens.shape[1], decision.num_accepted, int(decision.finished)]])
        padding = tokens.new_zeros(1, width - tokens.shape[1])
        sent = self.of_first(torch.cat([counts, tokens, padding], dim=1))
        kept, num_accepted, finished = sent[0, :3].tolist()
        emitted_ids = sent[:, 3 : 3 + kept]
        return replace(decision, emitted_ids=emitted_ids, num_accepted=num_accepted, finished=bool(finished))

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process's values of a tensor that has one shape in all of them."""
        sent = tensor.clone()
        torch.distributed.broadcast(sent, torch.distributed.get_global_rank(self._group, 0), group=self._group)
        return sent
