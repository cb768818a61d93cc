"""How close a kernel must come to the truth."""

from __future__ import annotations

from torch import Tensor

FLOOR = 1e-6  # relative, for cases where plain torch is exact


def relative_error(out: Tensor, truth: Tensor) -> float:
    """‖out − truth‖ ÷ ‖truth‖ in fp64."""
    difference = out.double() - truth.double()
    return float(difference.norm() / truth.double().norm().clamp(min=1e-30))


def assert_as_good(out: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The kernel errs at most twice as much as plain torch in the same dtype (fp64 is truth)."""
    ours, theirs = relative_error(out, truth), relative_error(plain, truth)
    assert ours <= 2 * theirs + FLOOR, f"kernel {ours:.3g}, plain torch {theirs:.3g}"
