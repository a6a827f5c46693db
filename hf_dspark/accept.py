"""Step 5, accept: the longest accepted prefix and the law of the token after it (paper section 2.1). Batched.

`choose_tokens` applies the call's rule to the target's logits; the functions below it are the pure part.
"""

from collections.abc import Callable

import torch

from .dispatch import with_kernel
from .sampling import Prefixes, SamplingRule, draw, process_ragged, process_scores, softmax_at
from .state import Acceptance, Choice, Distribution, DraftBlock
from .warpers import Warpers


def choose_tokens(
    rule: SamplingRule,
    input_ids: torch.Tensor,  # [B, n]  committed tokens
    logits: torch.Tensor,  # [B, L+1, V]  the target's, raw
    draft_ids: torch.Tensor,  # [B, L]
    block: DraftBlock | None,  # where draft_ids come from; None for L = 0
    *,
    eos_ids: torch.Tensor | None = None,
    stops: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    limits: torch.Tensor | None = None,
    prefixes: Prefixes | None = None,
    live: torch.Tensor | None = None,
) -> Choice:
    """Accepted tokens and the target's own next one, by `rule`.

    Of row r only the first `limits[r]` of its drafted tokens are considered (None: all). `prefixes` stands for
    `input_ids` where rows are of different lengths. Rows that are not `live` [B] do not stop the others.

    Processors that keep a state are not called behind a token that is not emitted: one behind a rejection, behind one
    of `eos_ids`, or behind a prefix of drafted tokens [B, i] for which `stops(prefix, scores)` is true.
    """
    length = draft_ids.shape[1]
    candidate_ids = torch.cat([input_ids, draft_ids], dim=1)

    def process(accepts) -> torch.Tensor:
        def goes_on(i: int, scores: torch.Tensor) -> bool:
            accepted = accepts(i, scores[:, i])
            if eos_ids is not None:
                accepted = accepted & ~torch.isin(draft_ids[:, i], eos_ids)
            if limits is not None:
                accepted = accepted & (i < limits)
            if live is not None:
                accepted = accepted | ~live
            # Synchronisations a token, where a processor keeps a state: it decides what is called, one by one.
            if not accepted.all().tolist():
                return False
            return stops is None or not stops(draft_ids[:, : i + 1], scores).any().tolist()

        if prefixes is not None and not rule.is_prefix_free:
            return process_ragged(rule, prefixes, draft_ids, logits)
        return process_scores(rule, candidate_ids, logits, goes_on if rule.is_stateful else None)

    if not rule.do_sample:
        scores = process(lambda i, row: row.argmax(-1) == draft_ids[:, i])
        target_ids = scores.argmax(-1)
        return Choice(target_ids, accept_greedy(draft_ids, target_ids, limits), scores)

    uniforms = rule.uniforms(draft_ids)
    if rule.temperature is not None:
        draft_logits = logits[:, :0] if block is None else block.draft_logits[:, :length].to(logits.device)
        return accept_and_draw(logits, draft_ids, draft_logits, uniforms, rule.temperature, rule.generator, limits)
    draft_law = Distribution(logits[:, :0]) if block is None else block.distribution.narrow(length)
    target_law, scores = rule.sparse_distribution(logits, exact=True), None
    if target_law is None:

        def accepts(i: int, row: torch.Tensor) -> torch.Tensor:
            token = draft_ids[:, i, None]
            bound = uniforms[:, i, None] * draft_law.probs[:, i].gather(-1, token)
            return (bound < row.softmax(-1).gather(-1, token)).squeeze(-1)

        scores = process(accepts)
        target_law = Distribution(scores.softmax(-1))
    columns, draft_probs, target_probs = on_common_support(draft_ids, draft_law, target_law, logits.shape[-1])
    acceptance = accept_prefix(columns, draft_probs, target_probs, uniforms, limits)
    next_ids = rule.draw(acceptance.next_probs).unsqueeze(-1)
    if target_law.support_ids is not None:
        next_ids = _row(target_law.support_ids, acceptance.num_accepted).gather(-1, next_ids)
    return Choice(_join(draft_ids, acceptance.num_accepted, next_ids), acceptance.num_accepted, scores)


def choose_by(
    warpers: Warpers | None,
    logits: torch.Tensor,  # [B, L+1, V]
    draft_ids: torch.Tensor,  # [B, L]
    draft_probs: torch.Tensor | None,  # [B, L, V]
    uniforms: torch.Tensor | None,  # [B, L]
    exponentials: torch.Tensor | None,  # [B, V]
    limits: torch.Tensor | None = None,  # [B]
) -> Choice:
    """`choose_tokens` by a rule that is traceable, with its random numbers as arguments; the host reads nothing.

    `warpers` of None are greedy, and need neither draft probabilities nor random numbers.
    """
    if warpers is None:
        target_ids = logits.argmax(-1)
        return Choice(target_ids, accept_greedy(draft_ids, target_ids, limits), None)
    acceptance = accept_prefix(draft_ids, draft_probs, warpers(logits), uniforms, limits)
    next_ids = (acceptance.next_probs / exponentials).argmax(-1, keepdim=True)
    return Choice(_join(draft_ids, acceptance.num_accepted, next_ids), acceptance.num_accepted, None)


@with_kernel
def accept_and_draw(
    target_logits: torch.Tensor,  # [B, L+1, V]
    draft_ids: torch.Tensor,  # [B, L]
    draft_logits: torch.Tensor,  # [B, L, V]  each token was drawn from softmax(draft_logits / temperature)
    uniforms: torch.Tensor,  # [B, L]  in [0, 1)
    temperature: float,
    generator: torch.Generator | None,
    limits: torch.Tensor | None = None,  # [B]  as in `accept_prefix`
) -> Choice:
    """`accept_prefix` and the token after it, drawn by `generator`, where both laws are softmaxes at `temperature`."""
    draft_probs, target_probs = softmax_at(temperature, draft_logits), softmax_at(temperature, target_logits)
    acceptance = accept_prefix(draft_ids, draft_probs, target_probs, uniforms, limits)
    next_ids = draw(acceptance.next_probs, generator).unsqueeze(-1)
    return Choice(_join(draft_ids, acceptance.num_accepted, next_ids), acceptance.num_accepted, None)


def accept_prefix(
    draft_ids: torch.Tensor,  # [B, L]
    draft_probs: torch.Tensor,  # [B, L, V]  the law each token was drawn from
    target_probs: torch.Tensor,  # [B, L+1, V]
    uniforms: torch.Tensor,  # [B, L]  in [0, 1)
    limits: torch.Tensor | None = None,  # [B]  drafted tokens that are considered; None: all
) -> Acceptance:
    """Keep drafted tokens left to right with probability min(1, p_target / p_draft); then the residual law.

    The comparison is strict, so a uniform of exactly 0 never accepts a token the target gives probability 0.
    Where the residual (p_target - p_draft)+ has no mass (equal laws up to rounding), the target's law is used.
    """
    length = draft_ids.shape[1]
    if length == 0:
        return Acceptance(draft_ids.new_zeros(draft_ids.shape[0]), target_probs[:, 0])
    tokens = draft_ids.unsqueeze(-1)
    kept = uniforms * draft_probs.gather(-1, tokens).squeeze(-1) < target_probs[:, :-1].gather(-1, tokens).squeeze(-1)
    num_accepted = _within(kept.long().cumprod(-1).sum(-1), limits)
    target_row = _row(target_probs, num_accepted)
    residual = (target_row - _row(draft_probs, num_accepted.clamp_max(length - 1))).clamp_min(0)
    mass = residual.sum(-1, keepdim=True)
    # After full acceptance nothing is subtracted: the bonus token comes from the target's own law there.
    from_residual = (num_accepted < (length if limits is None else limits)).unsqueeze(-1) & (mass > 0)
    return Acceptance(num_accepted, torch.where(from_residual, residual / mass, target_row))


def accept_greedy(
    draft_ids: torch.Tensor,  # [B, L]
    target_ids: torch.Tensor,  # [B, L+1]
    limits: torch.Tensor | None = None,  # [B]  as in `accept_prefix`
) -> torch.Tensor:
    """Number of drafted tokens [B] that equal the target's own choice.

    The same rule with one-hot laws; the token after them is `target_ids` at that position.
    """
    return _within((draft_ids == target_ids[:, :-1]).long().cumprod(-1).sum(-1), limits)


def on_common_support(
    draft_ids: torch.Tensor,  # [B, L]
    draft: Distribution,  # L positions
    target: Distribution,  # L+1 positions
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drafted columns [B, L], draft probabilities [B, L, K] and target probabilities [B, L+1, K] over one support.

    The support is the target's, with one more column for every token outside it: the target gives it probability 0,
    so it can neither be accepted nor be drawn, and its draft probability matters only to be positive.
    """
    if target.support_ids is None:
        return draft_ids, _dense(draft, vocab_size), target.probs
    ids = target.support_ids[:, :-1]
    if draft.support_ids is None:
        draft_probs = draft.probs.gather(-1, ids)
    else:
        same = ids.unsqueeze(-1) == draft.support_ids.unsqueeze(-2)  # [B, L, K_target, K_draft]
        draft_probs = (same * draft.probs.unsqueeze(-2)).sum(-1)
    outside = torch.ones_like(draft_probs[..., :1])
    hit = ids == draft_ids.unsqueeze(-1)
    columns = torch.where(hit.any(-1), hit.long().argmax(-1), ids.shape[-1])
    target_probs = torch.cat([target.probs, torch.zeros_like(target.probs[..., :1])], dim=-1)
    return columns, torch.cat([draft_probs, outside], dim=-1), target_probs


def _within(num_accepted: torch.Tensor, limits: torch.Tensor | None) -> torch.Tensor:
    return num_accepted if limits is None else torch.minimum(num_accepted, limits)


def _row(probs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Row `index` [B] of `probs` [B, L, K], as [B, K]."""
    return probs.gather(1, index.view(-1, 1, 1).expand(-1, 1, probs.shape[-1])).squeeze(1)


def _join(draft_ids: torch.Tensor, num_accepted: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """The first `num_accepted` [B] of `draft_ids` [B, L], then `next_ids` [B, 1]; [B, L+1]."""
    is_drafted = torch.arange(draft_ids.shape[1] + 1, device=draft_ids.device) < num_accepted.unsqueeze(-1)
    return torch.where(is_drafted, torch.cat([draft_ids, next_ids], dim=1), next_ids)


def _dense(distribution: Distribution, vocab_size: int) -> torch.Tensor:
    if distribution.support_ids is None:
        return distribution.probs
    probs = distribution.probs
    return probs.new_zeros(*probs.shape[:-1], vocab_size).scatter(-1, distribution.support_ids, probs)
