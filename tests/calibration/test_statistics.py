"""Where a sum that is not finite is noticed."""

from __future__ import annotations

import torch

from bs_exp.calibration.statistics import is_finite


def test_of_a_gram_the_diagonal_tells_and_of_other_sums_every_entry() -> None:
    broken = torch.eye(3)
    broken[0, 2] = torch.nan
    assert is_finite({"gradient": torch.eye(3), "gram": torch.eye(3)})
    assert not is_finite({"gradient": broken})
    assert not is_finite({"gram": torch.full((3, 3), torch.inf)})
