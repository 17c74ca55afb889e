"""data.py medmnist: a file of MedMNIST to 8-bit PNG slices, the lists of its published split, and labels.csv.

Such a file (organamnist_64.npz; Yang et al., MedMNIST v2, Scientific Data 2023) holds train_images, (N, H, W)
or in colour (N, H, W, 3) uint8, and train_labels: (N, 1), the number of the class, or (N, K) of 0 and 1; val_
and test_ likewise. It names neither classes nor patients.
"""

import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ct.properties import Properties, read_json, write_properties
from ct.slices import DataError, check_side, write_png
from engine.config import one_line
from engine.files import write_whole
from engine.ownership import claim, contents, refuse_foreign, refuse_other_folder, sha256
from prepare.lists import files_beside_images, remove_lists, write_lists
from prepare.npz import opened

MEDMNIST = "data.py medmnist"  # by which its files are known, see engine/ownership.py
PARTS = ("train", "val", "test")


def make_from_medmnist(args):
    """The medmnist command. medmnist.json says of which file; "complete" is true once everything is written.

    All of the file but the pixels is checked before anything is written. A call that was interrupted starts
    over.
    """
    out, about = Path(args.out), {"sha256": sha256(Path(args.file)), "names": args.names}
    with opened(args.file, "a file of MedMNIST") as archive:
        shapes = {part: image_shape(archive, part) for part in PARTS}
        if len({shape[1:] for shape in shapes.values()}) > 1:
            raise DataError(f"{args.file}: images of different sizes: {', '.join(map(str, shapes.values()))}")
        labels = {part: read_labels(archive, part, shapes[part][0]) for part in PARTS}
        classes = class_names_of(labels, args)
        names = {part: [f"{part}/{i:05d}.png" for i in range(shapes[part][0])] for part in PARTS}
        if is_there(out, about, names):
            print(f"{out}: made of this file already")
            return 0
        refuse_other_folder(out, MEDMNIST)
        existing = [path for part in PARTS for path in contents(out / "images" / part)]
        beside = [*files_beside_images(out), out / "labels.csv"]
        refuse_foreign([*beside, *existing], [args.file], MEDMNIST, record=out)
        for part in PARTS:
            (out / "images" / part).mkdir(parents=True, exist_ok=True)
        claim(out, MEDMNIST)
        write_whole(out / "medmnist.json", json.dumps(about | {"complete": False}))
        remove_lists(out, MEDMNIST)
        colored = write_images(archive, names, out)
    write_whole(out / "labels.csv", labels_csv(names, labels, classes), MEDMNIST)
    size = shapes["train"][1:3]
    known = {"kind": "uint8", "size": size, "source": Path(args.file).name, "made_by": MEDMNIST}
    write_properties(out, Properties(**known))
    write_lists(out, names | {"unlabelled": names["train"]}, MEDMNIST)
    write_whole(out / "medmnist.json", json.dumps(about | {"complete": True}))
    if colored:
        print(f"{args.file}: in colour; the slices are its luminance (ITU-R BT.601)")
    counts = ", ".join(f"{len(names[part])} {part}" for part in PARTS)
    kind = "one of {} classes each" if labels["train"].shape[1] == 1 else "{} labels each, 0 or 1"
    print(f"{out}: slices of {size[0]} x {size[1]} px ({counts}); {kind.format(len(classes))}")
    return 0


def is_there(out, about, names):
    """Whether the set is there, all of it, made of this file; DataError if it is of another one."""
    path = out / "medmnist.json"
    if not path.exists():
        return False
    there = read_json(path, dict)
    if there | {"complete": True} != about | {"complete": True}:
        raise DataError(f"{out}: made of another file, or with other names; choose another folder")
    files = [*files_beside_images(out), out / "labels.csv"]
    files += [out / "images" / name for own in names.values() for name in own]
    return there.get("complete") and all(file.is_file() for file in files)


def write_images(archive, names, out):
    """The slices of all parts; whether any of them was in colour."""
    colored = False
    with tqdm(total=sum(map(len, names.values())), desc="medmnist", unit="slice", disable=None) as bar:
        for part, own in names.items():
            images = (image for some in archive.blocks(f"{part}_images") for image in some)
            for name, image in zip(own, images, strict=True):
                if image.ndim == 3:
                    colored = colored or bool((image != image[..., :1]).any())
                    image = np.asarray(Image.fromarray(image).convert("L"))
                write_png(out / "images" / name, image, MEDMNIST, record=out)
                bar.update()
    return colored


# ---- What the file holds -------------------------------------------------------------------------


def image_shape(archive, part):
    """(N, H, W) or (N, H, W, 3) of a part's images."""
    shape, dtype = archive.header(f"{part}_images")
    about = f"{archive.path}: {part}_images: {dtype} {shape}"
    if len(shape) == 5 or (len(shape) == 4 and shape[3] != 3):
        raise DataError(f"{about} are volumes; this command takes images, (N, H, W) or (N, H, W, 3)")
    if len(shape) not in (3, 4) or dtype != np.uint8 or shape[0] == 0:
        raise DataError(f"{about}, where uint8 (N, H, W) or (N, H, W, 3) is expected, N above 0")
    check_side(archive.path, shape[1:3])
    return shape


def read_labels(archive, part, count):
    """Labels (N, 1) or (N, K) of a part with so many images, int64."""
    shape, dtype = archive.header(f"{part}_labels")
    if dtype.kind not in "iub" or len(shape) != 2 or shape[0] != count or shape[1] < 1:
        wanted = f"integers ({count}, 1) or ({count}, K) are expected, a row for each image"
        raise DataError(f"{archive.path}: {part}_labels: {dtype} {shape}, where {wanted}")
    return np.concatenate([*archive.blocks(f"{part}_labels")]).astype(np.int64)


def class_names_of(labels, args):
    """The names given with --names, else numbers: of a single label up to the largest one of training."""
    columns = labels["train"].shape[1]
    if len({own.shape[1] for own in labels.values()}) > 1:
        shapes = ", ".join(f"{part} {own.shape}" for part, own in labels.items())
        raise DataError(f"{args.file}: labels with different numbers of columns: {shapes}")
    classes = columns if columns > 1 else int(labels["train"].max()) + 1
    names = split_names(args.names) if args.names else [*map(str, range(classes))]
    if columns > 1 and len(names) != columns:
        raise DataError(f"--names: {len(names)} names, but {columns} labels in {args.file}")
    highest = 1 if columns > 1 else len(names) - 1
    for part, own in labels.items():
        for wrong in own[(own < 0) | (own > highest)][:1]:
            raise DataError(f"{args.file}: {part}_labels: {wrong}, where 0 to {highest} is expected")
    return names


def split_names(given):
    """a,b,c, in quotes where a name has a comma."""
    names = next(csv.reader([given], skipinitialspace=True))
    if len({"slice", "", *names}) < len(names) + 2 or not "".join(names).isprintable():
        raise DataError(f"--names {one_line(given)}: different names with commas between them are expected")
    return names


def labels_csv(names, labels, classes):
    """slice,label with the name of the class; or slice,NAME,NAME ... of 0 and 1."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    single = labels["train"].shape[1] == 1
    table.writerow(["slice", "label"] if single else ["slice", *classes])
    for part, own in names.items():
        rows = labels[part].tolist()
        table.writerows([name, *([classes[row[0]]] if single else row)] for name, row in zip(own, rows))
    return text.getvalue()
