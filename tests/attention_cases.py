"""The cases in which block attention's levels are compared: one table, run by the tests and by the GPU example."""

from dataclasses import dataclass

import torch

# Largest difference from the plain function in fp64, as a share of the largest value, and why there is one.
TOLERANCES = {
    torch.float32: 4e-6,  # another order of sums
    torch.float16: 2e-3,  # weights are rounded to 2^-11 before they meet the values, and so is the result
    torch.bfloat16: 1.6e-2,  # likewise, to 2^-8
}


@dataclass(frozen=True)
class Case:
    """One call. With `lengths` rows are ragged, and what lies behind their keys is not a number."""

    name: str
    group: int = 4
    head_dim: int = 64
    rows: int = 8
    keys: int = 200
    dtype: torch.dtype = torch.float32
    key_heads: int = 2
    lengths: tuple[int, ...] | None = None
    is_causal: bool = True
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def tolerance(self) -> float:
        """See TOLERANCES."""
        return TOLERANCES[self.dtype]

    def inputs(self, device: str) -> tuple[tuple[torch.Tensor, ...], dict]:
        """Query, key and value, and the keyword arguments; the query lies in memory as models have it."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        batch_size, num_heads = len(self.lengths or (0,)), self.group * self.key_heads
        query = random(batch_size, self.rows, num_heads, self.head_dim).transpose(1, 2)
        key, value = (random(batch_size, self.key_heads, self.keys, self.head_dim) for _ in range(2))
        for row, length in enumerate(self.lengths or ()):
            key[row, :, length:] = value[row, :, length:] = torch.nan
        settings = {
            "scaling": self.head_dim**-0.5,
            "is_causal": self.is_causal,
            "lengths": None if self.lengths is None else torch.tensor(self.lengths, device=device),
            "window": self.window,
            "softcap": self.softcap,
            "sinks": 2 * random(num_heads) if self.has_sinks else None,
        }
        return (query, key, value), settings


def in_double(inputs: tuple[tuple[torch.Tensor, ...], dict]) -> tuple[tuple[torch.Tensor, ...], dict]:
    """The same numbers on the CPU in fp64."""
    states, settings = inputs
    settings = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    if settings["sinks"] is not None:
        settings["sinks"] = settings["sinks"].double()
    return tuple(state.cpu().double() for state in states), settings


_FLAGS = {
    "bidirectional": {"is_causal": False},
    "window": {"window": 50},
    "window shorter than the block": {"window": 3},
    "bidirectional window": {"window": 50, "is_causal": False},
    "sinks": {"has_sinks": True},
    "soft-cap": {"softcap": 1.5},
    "window and sinks": {"window": 50, "has_sinks": True},
    "window and soft-cap": {"window": 50, "softcap": 1.5},
    "everything": {"window": 50, "has_sinks": True, "softcap": 1.5, "lengths": (200, 21)},
}
_HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}

CASES = [
    *(Case(f"groups of {group}", group=group) for group in range(1, 9)),
    *(Case(f"head size {size}", head_dim=size) for size in (16, 32, 128, 256)),
    *(Case(f"{rows} rows", rows=rows) for rows in (1, 2, 3, 5, 7, 9, 16, 17)),
    Case("17 rows in groups of 8", rows=17, group=8),
    *(
        Case(f"{keys} keys", rows=rows, keys=keys)
        for rows, keys in ((1, 1), (8, 8), (8, 9), (8, 128), (8, 129), (8, 700))
    ),
    *(Case(name, **flags) for name, flags in _FLAGS.items()),
    Case("ragged", lengths=(200, 8, 64, 129)),
    Case("ragged, one row a block", rows=1, lengths=(1, 200, 128)),
    Case("ragged, bidirectional", lengths=(200, 8, 64), is_causal=False),
    Case("ragged, window", lengths=(200, 8, 64, 129), window=16),
    Case("ragged, 17 rows, sinks", rows=17, lengths=(17, 300, 90), keys=400, has_sinks=True),
    Case("one split, sinks", keys=120, has_sinks=True),
    Case("one split, everything", keys=120, **_FLAGS["everything"] | {"lengths": (120, 21)}),
    *(
        Case(f"{name}, {label}", dtype=dtype, **flags)
        for dtype, label in _HALF.items()
        for name, flags in {
            "head size 64": {},
            "head size 128": {"head_dim": 128},
            "head size 256": {"head_dim": 256},
            "bidirectional": {"is_causal": False, "head_dim": 128},
            "17 rows": {"rows": 17},
            **{name: _FLAGS[name] for name in ("window and sinks", "window and soft-cap", "everything")},
            "ragged": {"lengths": (200, 8, 64, 129), "head_dim": 128},
            "one split": {"keys": 120, "head_dim": 128, "has_sinks": True, "lengths": (120, 9)},
        }.items()
    ),
]
