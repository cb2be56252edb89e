"""The one table of tolerances: how far a result may be from its reference, and why no closer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    rtol: float
    atol: float
    why: str


TOLERANCES: Final = {
    "exact": Tolerance(0, 0, "the same operations on the same numbers, or a value that is only stored"),
    "float64": Tolerance(1e-11, 1e-12, "sums of up to a few hundred terms of order 1 at 1e-16 each, in another order"),
    "float32": Tolerance(1e-5, 2e-6, "the same sums at 6e-8 each"),
    "kernel float32": Tolerance(
        1e-5, 1e-5, "sums of up to 25,088 terms at 6e-8 each, and gradients by their largest entry"
    ),
    "bfloat16": Tolerance(2**-8, 1e-5, "computed in float32, rounded once to 8 bits: half a unit is 2^-9, doubled"),
    "bfloat16 cut": Tolerance(2**-7, 1e-5, "Triton's interpreter cuts bits off where a GPU rounds: a whole unit"),
    "float16": Tolerance(2**-11, 1e-5, "computed in float32, rounded once to 11 bits: half a unit is 2^-12, doubled"),
    "large mean": Tolerance(0, 1e-3, "a mean of 1000 deviations rounds to 1e-4 deviations; one pass would lose 5 %"),
    "quadrature": Tolerance(1e-9, 0, "Simpson's rule at 1/128: h^4 / 180 = 2e-11 times the fourth derivatives"),
    "calibrated": Tolerance(1e-5, 0, "alpha is float32, and so is the output whose variance is taken again"),
    "transmission": Tolerance(0, 0.02, "8 layers of width 512: at most 0.006 over 12 seeds; the wrong gain: 0.3"),
    "trajectory": Tolerance(1e-9, 1e-9, "50 steps in float64, of which each may enlarge the rounding of those before"),
    "trajectory float32": Tolerance(1e-3, 1e-4, "20 steps in float32: 6e-8 in each, enlarged by those after"),
    "single precision bound": Tolerance(1e-6, 1e-7, "pws.clip_grad takes lengths in float32, 6e-8 of steps of 0.03"),
    "length from sums": Tolerance(
        0, 2e-6, "of the sum of squares of the gradient with its mean, from which 3 sums are taken"
    ),
    "half bias": Tolerance(
        2**-5, 2**-9, "torch's operators round a bias, its momentum and their products to 8 bits each"
    ),
    "identity float64": Tolerance(1e-9, 1e-9, "of a scale of 1; variances of small signals lose up to 7 of 16 digits"),
    "identity float32": Tolerance(1e-4, 1e-4, "the same in float32, whose 6e-8 a sum that cancels enlarges"),
    "batch norm": Tolerance(0, 1e-3, "BatchNorm's backward in float32 leaves a sum of 1e-4 where few positions vary"),
    "finite difference": Tolerance(1e-6, 1e-6, "central, steps of 1e-5: 1e-10 by the step, 1e-11 by rounding"),
    "initial deviation": Tolerance(0.01, 0, "of 73,728 normal weights: 1 / sqrt(2 * 73728) = 0.0026, nearly 4 of them"),
}


def assert_close(actual: Tensor | float, expected: Tensor | float, row: str) -> None:
    """Compare in float64 by a row of the table; a dtype is asserted where it matters, not here."""
    tolerance = TOLERANCES[row]
    pair = [torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected)]
    torch.testing.assert_close(*pair, rtol=tolerance.rtol, atol=tolerance.atol)
