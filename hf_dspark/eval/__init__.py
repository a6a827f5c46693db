"""Measuring a draft: prompt files, the benchmark, its figures and its plots."""

from .benchmark import run_benchmark
from .plots import plot_benchmark
from .prompts import PromptSet, read_prompts

__all__ = ["PromptSet", "plot_benchmark", "read_prompts", "run_benchmark"]
