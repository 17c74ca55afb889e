"""The lists of a new set: which cases are for training, validation and test."""

import numpy as np

from engine.files import write_whole
from engine.ownership import remove_own

SPLITS = ("train", "val", "test", "unlabelled")
ABOUT = ("set.json",)  # what else lies beside the lists


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


def files_beside_images(root):
    """All that a command may write into the root of a set."""
    return [root / name for name in (*(f"{split}.txt" for split in SPLITS), *ABOUT)]


def write_lists(root, lists, made_by):
    """{"train": names, ...} to root/train.txt ...; an empty list is not written."""
    for split, names in lists.items():
        if names:
            write_whole(root / f"{split}.txt", "\n".join(names) + "\n", made_by)


def remove_lists(root, made_by):
    """What follows rewrites the set: without its lists nobody takes it for complete. The user's own stay."""
    remove_own([root / f"{split}.txt" for split in SPLITS], made_by)
