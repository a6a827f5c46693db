"""Types of command line options that several commands share."""

import argparse

import torch


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def device(name: str) -> str:
    """ "auto", or a device that PyTorch can use here."""
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:  # an unknown name; a PyTorch without CUDA
            reason = str(error).partition("\n")[0]
            raise argparse.ArgumentTypeError(f"{name!r} cannot be used here: {reason}") from None
    return name
