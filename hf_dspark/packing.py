"""Rows of different lengths without the padding between them: what the target's layers read costs what it holds."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Packing:
    """The order of T tokens of R rows in one packed row, and in R rows padded behind to W tokens."""

    places: torch.Tensor  # [T]  of each packed token among the R * W padded ones
    sources: torch.Tensor  # [R, W]  the packed token of each padded one; padding repeats its row's last

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device) -> "Packing":
        """For rows of so many tokens each, at least one."""
        width, places, sources, start = max(lengths), [], [], 0
        for row, length in enumerate(lengths):
            places += range(row * width, row * width + length)
            sources.append([start + min(column, length - 1) for column in range(width)])
            start += length
        return cls(torch.tensor(places, device=device), torch.tensor(sources, device=device))

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """[1, T, ...] of [R, W, ...]."""
        return states.flatten(0, 1)[self.places.to(states.device)].unsqueeze(0)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """[R, W, ...] of [1, T, ...]."""
        return states[0, self.sources.to(states.device)]
