"""ct/organs.py: every organ has a colour of its own, and keeps it."""

import numpy as np

from ct import organs
from ct.organs import class_colors


def test_every_organ_has_a_color_of_its_own():
    colors = organs.ORGAN_COLORS.astype(int)
    assert colors.shape == (256, 3) and not colors[0].any()
    distances = np.abs(colors[:14, None] - colors[None, :14]).sum(2) + 999 * np.eye(14, dtype=int)
    assert distances.min() > 80


def test_an_organ_keeps_its_color_under_another_number_and_spelling():
    names = ["background", "tumour", "Liver", "kidney_right", "spleen", "liver"]
    colors = class_colors(names)
    assert (colors[2:5] == organs.ORGAN_COLORS[[6, 2, 1]]).all()
    assert len({tuple(color) for color in colors[:6]}) == 6  # the second liver and the tumour have others
    assert (class_colors(organs.BTCV_ORGANS) == organs.ORGAN_COLORS).all()
    assert (class_colors([f"class {i}" for i in range(255)]) == organs.ORGAN_COLORS).all()
