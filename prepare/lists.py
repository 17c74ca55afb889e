"""The lists of a new set: which cases are for training, validation and test."""

import numpy as np

from engine.files import write_whole


def split_cases(cases, val=None, test=None):
    """{"train", "val", "test"}: cases, drawn in a fixed random order. Without numbers for val and test 20 %
    of the cases, at least one; of two cases none is for val."""
    count = len(cases)
    order = [cases[i] for i in np.random.default_rng(0).permutation(count)]
    held_out = max(1, round(0.2 * count)) if count > 1 else 0
    test = held_out if test is None else test
    val = (held_out if count > 2 else 0) if val is None else val
    train = count - test - val
    return {
        "train": sorted(order[:train]),
        "val": sorted(order[train : train + val]),
        "test": sorted(order[train + val :]),
    }


def write_lists(root, lists):
    """{"train": names, ...} to root/train.txt ...; an empty list is not written."""
    for split, names in lists.items():
        if names:
            write_whole(root / f"{split}.txt", "\n".join(names) + "\n")


def remove_lists(root):
    """What follows rewrites the set: without its lists nobody takes it for complete."""
    for split in ("train", "val", "test", "unlabelled"):
        (root / f"{split}.txt").unlink(missing_ok=True)
