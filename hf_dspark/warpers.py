"""Temperature, top-k and top-p as operations of fixed shapes, which graphs hold; the host decides nothing.

With a top-k the k best scores and the number of those that equal the k-th say which are kept: the vocabulary is not
sorted, which takes a hundred times as long.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Warpers:
    """The three processors; temperature and top-p are tensors, so that one graph serves them all."""

    temperature: torch.Tensor  # []
    top_k: int | None
    tail: torch.Tensor | None  # []  1 - top_p

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The law [..., V] that transformers' processors give for `logits` [..., V]."""
        scores = logits / self.temperature
        if self.top_k is not None:
            scores = _keep_best(scores, min(self.top_k, scores.shape[-1]), self.tail)
        elif self.tail is not None:
            scores = _keep_all_but_tail(scores, self.tail)
        return scores.softmax(-1)


torch.export.register_dataclass(Warpers)


def _keep_all_but_tail(scores: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """transformers' top-p; the best is kept whatever `tail` is."""
    ordered, order = scores.sort(-1)
    is_tail = ordered.softmax(-1).cumsum(-1) <= tail
    is_best = torch.arange(scores.shape[-1], device=scores.device) == scores.shape[-1] - 1
    return scores.scatter(-1, order, ordered.masked_fill(is_tail & ~is_best, -torch.inf))


def _keep_best(scores: torch.Tensor, k: int, tail: torch.Tensor | None) -> torch.Tensor:
    """transformers' top-k, which keeps all that equal the k-th, and top-p behind it.

    Of equal scores the first go first, as by a stable sort that begins with the least; another sort leaves it to
    chance which of them go.
    """
    best = scores.topk(k).values  # [..., k]  falling
    last = best[..., -1:]
    if tail is None:
        return scores.masked_fill(scores < last, -torch.inf)
    cut, num_removed = _cut(best, (scores == last).sum(-1, keepdim=True), tail)
    is_cut = scores == cut
    is_kept = (scores > cut) | (is_cut & (is_cut.cumsum(-1, dtype=torch.int32) > num_removed))
    return scores.masked_fill(~is_kept, -torch.inf)


def _cut(best: torch.Tensor, num_last: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least score [..., 1] that top-p keeps, and how many that equal it are not kept.

    `best` [..., k] are the k best scores, falling; `num_last` [..., 1] equal the k-th.
    """
    masses = (best - best[..., :1]).exp()
    mass_last, is_above = masses[..., -1:], best > best[..., -1:]
    masses = masses * is_above
    mass_of_last = num_last * mass_last
    limit = tail * (masses.sum(-1, keepdim=True) + mass_of_last)
    # Those that equal the k-th go one by one, then those above them from the least on; the best one stays.
    num_gone = torch.where(mass_last > 0, (limit / mass_last).floor(), torch.inf)
    num_gone = num_gone.minimum(num_last - (~is_above[..., :1]).to(num_last.dtype))
    up_to_here = masses.flip(-1).cumsum(-1).flip(-1) + mass_of_last
    is_best = torch.arange(best.shape[-1], device=best.device) == 0
    is_gone = is_above & (up_to_here <= limit) & (num_gone == num_last) & ~is_best
    num_above = (is_above & ~is_gone).sum(-1, keepdim=True)
    cut = torch.where(num_gone < num_last, best[..., -1:], best.gather(-1, (num_above - 1).clamp_min(0)))
    num_removed = torch.where(num_gone < num_last, num_gone, (is_gone & (best == cut)).sum(-1, keepdim=True))
    return cut, num_removed
