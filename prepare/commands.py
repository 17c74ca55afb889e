"""The commands behind `python data.py ...`: make, convert, pack, check and show data sets."""

import argparse
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from augment import TwoViews
from ct.layout import mask_paths, split_folder, stacks_in
from ct.organs import BTCV_ORGANS, class_colors
from ct.pictures import contact_sheet, outlined, views_page
from ct.plausible import Values
from ct.properties import Properties, class_names, read_json, read_properties, write_properties
from ct.slices import IGNORE, DataError, in_threads, mask_mapping, read_mask, write_png
from data import Grid, Intensity, SliceDataset, default_window
from engine.config import ConfigError, OneLineParser
from engine.files import write_whole, written_whole
from engine.ownership import claim, contents, refuse_foreign, refuse_other_folder
from losses import matched_points, to_slice
from prepare.check import check_set, read_mask_map
from prepare.lists import files_beside_images, list_set, remove_lists, split_cases, write_lists
from prepare.medmnist import make_from_medmnist
from prepare.openkbp import make_from_openkbp
from prepare.phantom import phantom_case, phantom_spacing
from prepare.slicing import slice_volumes
from prepare.thinning import thin
from prepare.transunet import make_from_transunet

# By which the files of a command are known, see engine/ownership.py.
PACK, PHANTOM, SHOW = "data.py pack", "data.py phantom", "data.py show"
WARPS = {"rotate": (180, "degrees"), "shear": (1, "a factor"), "translate": (1, "a share")}  # at most, and in

# ---- Packing -------------------------------------------------------------------------------------


def pack(args):
    """The pack command: the slices of a list, on their common size, as one file that needs no decoding."""
    dataset = SliceDataset(args.root, args.list, args.images, args.hu_offset)
    out = Path(args.out.removesuffix(".npy"))
    about, array = out.with_name(out.name + ".json"), out.with_name(out.name + ".npy")
    refuse_foreign([about, array], files_read(dataset, args), PACK)
    out.parent.mkdir(parents=True, exist_ok=True)
    about.unlink(missing_ok=True)  # without it nobody takes the array for complete
    header = {"descr": "<i2", "fortran_order": False, "shape": (len(dataset), *dataset.size)}
    with written_whole(array, made_by=PACK) as file:
        np.lib.format.write_array_header_1_0(file, header)
        images = in_threads(dataset.__getitem__, range(len(dataset)), "packing")
        for index, image in enumerate(images):
            file.write(as_int16(image[0], dataset.path(index)).numpy())
    content = packed_properties(dataset, f"{args.root} {args.list}").as_dict()
    content |= {"names": [*dataset.names], "cases": [*dataset.cases], "complete": is_complete(dataset)}
    write_whole(about, json.dumps(content), PACK)
    size = f"{dataset.size[0]} x {dataset.size[1]}"
    print(f"{array}: {len(dataset)} slices of {size} px; cases: {len(set(dataset.cases))}")
    return 0


def is_complete(dataset):
    """Whether all neighbours of its slices are slices of a set, too."""
    if dataset.packed:
        return dataset.packed.complete
    return len(stacks_in(dataset.folder, dataset.names, 1)[0]) == len(dataset)


def as_int16(image, path):
    limits = torch.iinfo(torch.int16)
    if image.min() < limits.min or image.max() > limits.max:
        raise DataError(f"{path}: values from {image.min():g} to {image.max():g} do not fit into 16 bits")
    return image.round().to(torch.int16)


def packed_properties(dataset, source):
    """Those of the set, with the size that all slices have now, and their spacing on it."""
    facts, spacing = dataset.facts(), dataset.spacing_on_grid()
    known = {"kind": facts.kind, "hu_offset": facts.hu_offset, "size": dataset.size, "spacing": spacing}
    return replace(dataset.properties, **known, source=source, made_by=PACK)


def files_read(dataset, args):
    """The files that a set consists of: its slices, or its array with its names, and the list."""
    if dataset.packed:
        yield from (dataset.packed.path, dataset.packed.path.with_suffix(".json"))
        return
    if args.list:
        yield Path(args.root) / args.list
    yield from map(dataset.path, range(len(dataset)))


# ---- Command line --------------------------------------------------------------------------------


def make_phantom(args):
    """The phantom command. phantom.json has the arguments; "complete" is true once everything is written."""
    out, cases = Path(args.out), [f"phantom{index:03d}" for index in range(args.cases)]
    names = {case: [f"{case}/{index:03d}.png" for index in range(args.slices)] for case in cases}
    about = {"cases": args.cases, "slices": args.slices, "size": args.size, "seed": args.seed}
    if (out / "phantom.json").exists():
        there = read_json(out / "phantom.json", dict)
        files = (out / part / name for part in ("images", "masks") for own in names.values() for name in own)
        if there == about | {"complete": True} and all(path.is_file() for path in files):
            print(f"{out}: this phantom is there already")
            return 0
        if there | {"complete": True} != about | {"complete": True}:
            raise DataError(f"{out}: holds a phantom with other arguments ({there}); choose another folder")
    refuse_other_folder(out, PHANTOM)
    folders = [out / part / case for part in ("images", "masks") for case in cases]
    existing = [path for folder in folders for path in contents(folder)]
    refuse_foreign([*files_beside_images(out), *existing], [], PHANTOM, record=out)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, PHANTOM)
    write_whole(out / "phantom.json", json.dumps(about | {"complete": False}))
    remove_lists(out, PHANTOM)

    list(in_threads(lambda case: write_phantom_case(out, case, args), cases, "phantom"))
    lists = split_cases(cases)
    lists["unlabelled"] = [case for case in cases if case not in lists["val"] + lists["test"]]
    spacing = phantom_spacing(args.slices, args.size)
    known = {"kind": "hu", "hu_offset": 1024, "axis": 2, "size": (args.size, args.size)}
    known |= {"spacing": dict.fromkeys(cases, spacing), "classes": BTCV_ORGANS}
    source = f"procedural, seed {args.seed}"
    write_properties(out, Properties(**known, source=source, made_by=PHANTOM))
    slices = {split: sum((names[case] for case in part), []) for split, part in lists.items()}
    write_lists(out, slices, PHANTOM)
    write_whole(out / "phantom.json", json.dumps(about | {"complete": True}))
    parts = ", ".join(f"{len(part)} {split}" for split, part in lists.items())
    print(f"{out}: {args.cases} cases of {args.slices} slices of {args.size} px (cases: {parts})")
    return 0


def write_phantom_case(out, case, args):
    hu, labels = phantom_case(args.seed * 100_003 + int(case[7:]), args.slices, args.size)
    stored = (hu.astype(np.int32) + 1024).clip(0).astype(np.uint16)
    for folder, values in (("images", stored), ("masks", labels)):
        (out / folder / case).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(values):
            write_png(out / folder / case / f"{number:03d}.png", image, PHANTOM, record=out)


def show(args):
    """The show command: evenly spaced slices of a list with mask outlines, or pairs of views, on one page.
    What cannot be read is named and passed over."""
    dataset = SliceDataset(args.root, args.list, args.images, args.hu_offset, skip_bad=True)
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise DataError(f"--out {out}: the page is a PNG; give a name that ends in .png")
    refuse_foreign([out], files_read(dataset, args), SHOW)
    count = min(args.count or (5 if args.views else 24), len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    captions, slices, masks = zip(*read_shown(dataset, chosen, args))
    slices = torch.stack(slices)  # (N, 1, H, W)
    page = show_views(slices, captions, args) if args.views else show_masks(slices, masks, captions, args)
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out, made_by=SHOW) as file:
        page.save(file, format="PNG")
    print(f"{args.out}: {len(captions)} of {len(dataset)} slices, {page.width} x {page.height} px")
    return 0


def read_shown(dataset, chosen, args):
    """(name, slice (1, H, W) in [0, 1], mask (H, W)) of the chosen slices; without a mask it is 0."""
    mapping = mask_mapping(read_mask_map(args.mask_map))
    folder, found, values = split_folder(args.root, args.list, args.masks), [], Values()
    names = [dataset.names[index] for index in chosen]
    for name, index, path in zip(names, chosen, mask_paths(folder, names)):
        try:
            slice = dataset.read(index)
            mask = read_mask(path, mapping) if path.exists() else np.zeros(dataset.size, np.uint8)
        except DataError as error:
            reason = error
            print(f"warning: {error}; passed over", file=sys.stderr)
            continue
        mask = Grid(dataset.size).bring(torch.from_numpy(mask), 0, nearest=True).numpy()
        values.add(slice)
        found.append((name, dataset.on_common_size(slice)[None], mask))
    if not found:
        raise reason
    stored = dataset.kind == "stored"
    low = values.quantile(0.01)
    window = (low, max(values.quantile(0.99), low + 1)) if stored else default_window(dataset.kind)
    return [(name, Intensity(window).to_unit(slice), mask) for name, slice, mask in found]


def show_views(slices, captions, args):
    warp = {name: getattr(args, name) for name in WARPS}
    views = TwoViews(size=min(slices.shape[-2:]), flip=0.5, **warp)
    view1, view2, *boxes = views(slices, torch.Generator().manual_seed(args.seed))
    points1, points2, keep = matched_points(*boxes, views.size, stride=1, grid=4)
    pair = view1[:, 0].numpy(), view2[:, 0].numpy()
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).expand(len(slices), 4, 2)
    outlines = [to_slice(corners, box).numpy() for box in boxes]
    flips = [(box[:, 4] > 0.5).tolist() for box in boxes]
    return views_page(slices[:, 0].numpy(), pair, outlines, flips, (points1, points2), keep, captions)


def show_masks(slices, masks, captions, args):
    """Slices with the outlines of their masks; classes without names are called by number."""
    names = []
    if highest := max(mask[mask != IGNORE].max(initial=0) for mask in masks):
        names = class_names(args.root, int(highest) + 1)
        own = read_properties(args.root).classes or []
        names = own + names[len(own) :]  # `data.py check` calls labels without a name bad
    colors = class_colors(names)
    tiles = [outlined(image.numpy(), mask, 256, colors) for image, mask in zip(slices[:, 0], masks)]
    return contact_sheet(tiles, captions, names)


def parse(argv):
    parser = OneLineParser(description="Data sets of CT slices: make, convert, check and show them.")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="phantom|slice|medmnist|transunet|openkbp|list|thin|pack|check|show",
    )

    def command(name, function, help):
        sub = commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(function=function)
        return sub

    def set_options(sub, masks):
        sub.add_argument("--root", required=True, help="the data set's folder")
        sub.add_argument("--images", default="images", help="folder of the slices; {split}: the list's name")
        if masks:
            sub.add_argument("--masks", default="masks", help="folder of the masks; {split}: the list's name")
            sub.add_argument("--mask-map", metavar="JSON", help="as data.mask_map: {pixel: class}")
        sub.add_argument(
            "--hu-offset",
            type=finite,
            help="HU = value of a 16-bit picture - this; without: the set's, or 1024",
        )

    def patient_option(sub):
        help = "what in a path names the patient: its first group, or all that matches; splits are by patient"
        sub.add_argument("--patient", type=pattern, metavar="REGEX", help=help)

    sub = command("phantom", make_phantom, "procedural abdominal CT with 13 organs, 60/20/20 by case")
    sub.add_argument("--out", required=True, help="folder of the new set")
    sub.add_argument("--cases", type=at_least(3), default=40)
    sub.add_argument("--slices", type=at_least(1), default=24, help="slices a case")
    sub.add_argument("--size", type=at_least(16), default=128, help="px")
    sub.add_argument("--seed", type=at_least(0), default=0)

    sub = command("slice", slice_volumes, "volumes to 16-bit PNG slices (HU + 1024) and 8-bit masks")
    sub.add_argument(
        "--images",
        required=True,
        help="a volume (NIfTI, NRRD, MetaImage), a folder of them or with a folder for each case, a pattern "
        "in quotes; or a folder or tree of DICOM series",
    )
    sub.add_argument("--labels", help="the same with labels; without: slices for pretraining only")
    sub.add_argument("--out", required=True, help="folder of the new set")
    sub.add_argument("--label-map", help='JSON {"source id": target id}; ids not listed become 0')
    sub.add_argument("--classes", help="JSON list of class names, background first; or btcv: its 13 organs")
    sub.add_argument(
        "--split", help="JSON {train: [case ...], val: ..., test: ...}, or fractions: 0.7,0.1,0.2"
    )
    patient_option(sub)
    sub.add_argument("--workers", type=at_least(1), default=min(8, os.cpu_count() or 1), help="processes")
    sub.add_argument(
        "--axis", type=int, choices=(0, 1, 2), default=2, help="0 sagittal, 1 coronal, 2 axial slices"
    )
    sub.add_argument(
        "--spacing", type=positive, metavar="MM", help="resample slices in their plane to pixels of this size"
    )
    sub.add_argument("--pair", choices=("name", "number"), help="what an image and its labels have in common")
    sub.add_argument(
        "--channels",
        type=at_least(1),
        help="files of an image, CASE_0000, CASE_0001 ..., of which the first is taken; 1: each is an image",
    )
    sub.add_argument("--hu-offset", type=finite, default=0.0, help="HU = voxel - this")
    sub.add_argument("--ignore-values", action="store_true", help="take for HU what does not look like it")
    sub.add_argument(
        "--ignore-geometry",
        action="store_true",
        help="voxel i of the labels is voxel i of the image, where their affines say otherwise",
    )

    sub = command("medmnist", make_from_medmnist, "a file of MedMNIST to 8-bit PNG slices, lists, labels.csv")
    sub.add_argument("file", metavar="FILE", help="such as organamnist_64.npz")
    sub.add_argument("--out", required=True, help="folder of the new set")
    sub.add_argument("--names", help="of the classes, from 0 on: bladder,femur-left,...; without: numbers")

    sub = command("transunet", make_from_transunet, "TransUNet's files of Synapse to slices, masks and lists")
    sub.add_argument("folder", metavar="DIR", help="with train_npz, test_vol_h5 and their lists")
    sub.add_argument("--out", required=True, help="folder of the new set")
    sub.add_argument("--classes", help="names of classes 1, 2 ...: spleen,liver,...; without: numbers")
    sub.add_argument(
        "--transpose", action="store_true", help="rows for columns, of slices turned by 90 degrees"
    )
    sub.add_argument("--flip", choices=("rows", "columns", "both"), help="of slices upside down or mirrored")

    sub = command("openkbp", make_from_openkbp, "a clone of OpenKBP's repository to slices, masks and lists")
    sub.add_argument("--source", required=True, metavar="DIR", help="the clone, or its folder provided-data")
    sub.add_argument("--out", required=True, help="folder of the new set")
    words = "the classes, some of: brainstem, spinal cord, right parotid, left parotid, esophagus, larynx, "
    words += "mandible; train_partial.txt adds patients of whom some were drawn; without: the first four"
    sub.add_argument("--organs", metavar="NAME,...", help=words)

    sub = command("list", list_set, "lists of slices that lie in a folder, 60/20/20 by case")
    sub.add_argument("--root", required=True, help="the data set's folder")
    sub.add_argument("--images", default="images", help="folder of the slices")
    sub.add_argument("--masks", default="masks", help="folder of the masks, if there are any")
    patient_option(sub)
    words = "sparse annotation: train has one slice in N of each volume, and all lists are called sparse_..."
    sub.add_argument("--every", type=at_least(5), metavar="N", help=words)

    sub = command("thin", thin, "a shorter list, of the slices that differ most from each other")
    set_options(sub, masks=False)
    sub.add_argument("--list", required=True, help="list file below the root")
    sub.add_argument("--keep", type=share, required=True, help="share of the slices, above 0 and up to 1")
    sub.add_argument("--encoder", metavar="FILE", help="compare its features; without: 16 x 16 px averages")
    sub.add_argument("--out", default="thinned.txt", help="the new list, below the root; beside it a .png")

    sub = command("pack", pack, "the slices of a list in one file, NAME.npy, with their names in NAME.json")
    set_options(sub, masks=False)
    sub.add_argument("--list", required=True, help="list file below the root")
    sub.add_argument("--out", required=True, metavar="NAME")

    sub = command(
        "check", check_set, "reads everything: counts, HU statistics, labels, every bad file by name"
    )
    set_options(sub, masks=True)
    sub.add_argument("--list", nargs="+", help="list files below the root; without: all of them")

    sub = command("show", show, "a page of slices with mask outlines, or of augmented pairs")
    set_options(sub, masks=True)
    sub.add_argument("--list", help="list file below the root; without: every slice")
    sub.add_argument("--out", required=True, metavar="PAGE.png")
    sub.add_argument(
        "--views", action="store_true", help="two views of each slice with their matched regions"
    )
    sub.add_argument("--count", type=at_least(1), help="slices on the page")
    sub.add_argument("--seed", type=at_least(0), default=0, help="of the views")
    for name, (most, unit) in WARPS.items():
        help = f"of the views, up to this ({unit}), as augment.{name}"
        sub.add_argument(f"--{name}", type=between(0, most), default=0.0, help=help)
    return parser.parse_args(argv)


def pattern(text):
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression: {error}") from None


def finite(text):
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is no number")
    return value


def positive(text):
    if (value := finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def between(low, high):
    def number(text):
        if not low <= (value := finite(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} to {high}")
        return value

    return number


def share(text):
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 1")
    return value


def at_least(least):
    def whole_number(text):
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return whole_number


def main(argv=None):
    args = parse(argv)
    try:
        return args.function(args)
    except (DataError, ConfigError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or args.command}: {error.strerror or error}"
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"data.py {args.command}: {message}", file=sys.stderr)
    return 2
