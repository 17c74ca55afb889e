"""The 13 organs of BTCV and the colours of classes.

An organ has one colour everywhere, whatever its number in a data set: class_colors(names)[class].
"""

import colorsys
import re

import numpy as np

# fmt: off
BTCV_ORGANS = [
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
    "aorta", "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland",
    "left adrenal gland",
]
# fmt: on


def organ_colors():
    """(256, 3) uint8: black for 0, for the organs of BTCV thirteen colours that are easy to tell apart, then
    hues by the golden ratio."""
    colors = np.zeros((256, 3), np.uint8)
    colors[1:14] = [
        (230, 25, 75),  # spleen: red
        (60, 180, 75),  # right kidney: green
        (170, 255, 195),  # left kidney: mint
        (255, 225, 25),  # gallbladder: yellow
        (145, 100, 50),  # esophagus: brown
        (0, 130, 200),  # liver: blue
        (245, 130, 48),  # stomach: orange
        (240, 50, 230),  # aorta: magenta
        (70, 240, 240),  # inferior vena cava: cyan
        (145, 70, 220),  # portal and splenic veins: violet
        (250, 190, 212),  # pancreas: pink
        (210, 245, 60),  # right adrenal gland: lime
        (128, 128, 0),  # left adrenal gland: olive
    ]
    for index in range(14, 255):
        hue = index * 0.618034 % 1
        colors[index] = [round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.75, 0.95)]
    colors[255] = 128  # ignored
    return colors


ORGAN_COLORS = organ_colors()


def class_colors(names=()):
    """(256, 3) uint8: the colours of classes called `names`, background first.

    An organ of BTCV has its colour there, under any number and spelling (Liver, kidney_right); the other
    classes have what is left of ORGAN_COLORS, in order.
    """
    known = {words(organ): number for number, organ in enumerate(BTCV_ORGANS)}
    numbers = [known.get(words(name)) for name in names[1:]]
    left = iter(sorted({*range(1, 255)} - {*numbers}))
    colors = ORGAN_COLORS.copy()
    for index, number in enumerate(numbers, 1):
        taken = number is None or number in numbers[: index - 1]
        colors[index] = ORGAN_COLORS[next(left) if taken else number]
    return colors


def words(name):
    return frozenset(re.findall("[a-z]+", name.lower()))
