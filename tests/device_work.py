"""What the host reads from the device and what it launches, counted by dispatch modes; the same on a CPU.

    python tests/device_work.py

prints launches a round with the plain functions and with the kernels: operations that are not views or empty tensors.
On a GPU also the synchronisations that CUDA itself counts.
"""

import functools
import json
import os
import sys
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

TORCH = str(Path(torch.__file__).parent)
# Methods that read a CPU tensor without an operation; what reads by one, a dispatch mode sees.
METHODS = ("tolist", "cpu", "numpy", "__array__")
NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "lift_fresh")


class Reads(TorchDispatchMode):
    """While open, counts what makes the host wait for the device: (file, method or operation) -> times."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._methods = _Methods(self)

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._methods.__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tags = function.tags
        depends_on_values = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
        if function is torch.ops.aten.index.Tensor:  # by numbers, the shape is known
            depends_on_values = any(index is not None and index.dtype == torch.bool for index in args[1])
        if depends_on_values:
            self.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def add(self, name: str) -> None:
        """Count a read by the innermost file outside torch."""
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.counts[Path(frame.f_code.co_filename).stem, name] += 1


class _Methods(TorchFunctionMode):
    def __init__(self, reads: Reads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in METHODS:
            self._reads.add(function.__name__)
        return function(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """While open, counts operations and Triton kernels: part of the round -> times."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._parts = ["rest"]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.overloadpacket.__name__ not in NO_LAUNCH:
            self.counts[self._parts[-1]] += 1
        return function(*args, **(kwargs or {}))

    def within(self, part: str, function):
        """`function`, whose launches belong to `part`."""

        @functools.wraps(function)  # whose signature tells what it takes
        def counted(*args, **kwargs):
            self._parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._parts.pop()

        return counted

    def as_one(self, run):
        """A Triton kernel's `run`: one launch, whatever the interpreter does for it."""

        def counted(*args, **kwargs):
            self.counts[self._parts[-1]] += 1
            with _disable_current_modes():
                return run(*args, **kwargs)

        return counted


@contextmanager
def counting_launches(target, draft):
    """A `Launches` that is open during speculative decoding, with the parts of a round told apart."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    from hf_dspark import batch, batch_call, generate
    from hf_dspark import draft as drafting

    launches = Launches()
    parts = {
        "target": [(target, "forward")],
        "draft": [(draft, "forward"), (draft, "compute_logits")],
        "sample": [(drafting, "sample_block")],
        "accept": [(module, "choose_tokens") for module in (generate, batch, batch_call)],
    }
    kernel_type = InterpretedFunction if os.environ.get("TRITON_INTERPRET") == "1" else triton.JITFunction
    decode = draft.speculative_decode

    def counted(*args, **kwargs):
        with launches:
            return decode(*args, **kwargs)

    with ExitStack() as stack:
        for part, places in parts.items():
            for owner, name in places:
                function = launches.within(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, function))
        run = kernel_type.run
        stack.enter_context(mock.patch.object(kernel_type, "run", launches.as_one(run)))
        stack.enter_context(mock.patch.object(draft, "speculative_decode", counted))
        yield launches


@contextmanager
def counting_synchronisations():
    """The warnings of torch's own watch over CUDA, in a list."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [warning for warning in caught if "synchronizing" in str(warning.message)]


def main() -> None:
    """Launches a round of a tiny target and draft, block size 7, after those of the prefill are taken off."""
    import kernel_cases
    from tiny import make_tiny_draft, make_tiny_target, random_prompt

    from hf_dspark import dispatch, slots, traced

    slots.reads_by_masks = traced.reads_by_masks = lambda device: False  # as on CUDA
    device = "cuda:0" if kernel_cases.HAS_GPU else "cpu"
    dispatch._kernel_devices = lambda: frozenset({torch.device(device)})
    target = make_tiny_target("qwen3", seed=0).to(device)
    draft = make_tiny_draft(target, block_size=7).to(device)
    prompt = random_prompt(64, 9).to(device)
    settings = {"greedy": {"do_sample": False}, "temperature": {"do_sample": True, "top_k": 0, "temperature": 0.8}}
    for name, setting in settings.items():
        for switch in ("0", "1"):
            os.environ[dispatch.SWITCH] = switch
            counts, waits = [], []
            for new_tokens in (1, 40):
                arguments = {"assistant_model": draft, "max_new_tokens": new_tokens, **setting}
                torch.manual_seed(0)
                with counting_launches(target, draft) as launches:
                    target.generate(prompt, **arguments)
                counts.append(launches.counts)
                if kernel_cases.HAS_GPU:
                    torch.manual_seed(0)
                    with counting_synchronisations() as found:
                        target.generate(prompt, **arguments)
                    waits.append(len(found))
            rounds = draft.last_stats.rounds
            mean = {part: round((counts[1][part] - counts[0][part]) / rounds, 1) for part in counts[1]}
            row = {"setting": name, "kernels": switch == "1", "rounds": rounds, "launches_a_round": mean}
            if waits:
                row["synchronisations_a_round"] = round((waits[1] - waits[0]) / rounds, 2)
            print(json.dumps(row | {"all": round(sum(mean.values()), 1)}))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported
    main()
