"""Where a share of a mass falls: drawing by one uniform number, as `sampling.search` does."""

import triton
import triton.language as tl


@triton.jit
def find_share(
    mass,  # [SIZE]  fp64, not negative
    share,  # in [0, the sum of `mass`)
    SIZE: tl.constexpr,
):
    """The first index whose cumulative mass exceeds `share`, and the mass before it. It always has a mass of its own.

    A parallel sum may end one rounding below `share`: then the last index that has any is meant.
    """
    index = tl.arange(0, SIZE)
    is_reached = (mass > 0) & (tl.cumsum(mass, 0) > share)
    first = tl.min(tl.where(is_reached, index, SIZE), 0)
    last = tl.max(tl.where(mass > 0, index, 0), 0)
    found = tl.where(first < SIZE, first, last)
    return found, tl.sum(tl.where(index < found, mass, 0.0), 0)
