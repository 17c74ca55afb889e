"""A data set on disk: readers and writers of one slice and one mask, lists, cases, splits, packed sets.

    root/images/CASE/SLICE.png    8- or 16-bit greyscale PNG, or .npy (H, W) int16 in HU
    root/masks/CASE/SLICE.png     8-bit PNG, pixel = class index, 255 = ignore
    root/train.txt ...            one path per line, relative to images/

Every problem with a file raises `DataError`, one line that names the file.
"""

import json
import os
import re
import struct
import warnings
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from files import write_whole, written_whole

IGNORE = 255  # the mask value of pixels that neither train nor count
MAX_SIDE = 8192  # px; a header that claims more is refused before any memory is allocated
MAX_SPACING = 1000  # mm between voxels
MAX_JSON = 2**29  # bytes
PIXELS_PER_BYTE = 8 * 1032  # of a PNG, at most: deflate shrinks by no more than 1032 to 1
AIR = {"hu": -1024.0, "uint8": 0.0}  # what fills a slice that is brought to the common size
PNG_COLORS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
SUFFIXES = (".png", ".npy")
LONGEST_LINE = 8192  # characters of a list
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}
SPLIT_FOLDERS |= {"unlabelled", "unlabeled", "imagestr", "imagests"}


# Of a damaged PNG it is an error that says so. The second warning is of a second header: we check the first.
warnings.filterwarnings("ignore", module=r"PIL\.PngImagePlugin")
warnings.simplefilter("error", Image.DecompressionBombWarning)


class DataError(ValueError):
    """Data that cannot be used; the message is one line with the file and the reason."""


# ---- One slice, one mask -------------------------------------------------------------------------


def read_slice(path, hu_offset=1024):
    """One slice as float32 (H, W) in HU. 16-bit PNG: value - hu_offset; .npy: the value; 8-bit PNG: the
    value, whatever it means."""
    return read_stored(path, hu_offset)[0]


def read_stored(path, hu_offset=1024):
    """A slice as `read_slice` gives it, and what it is stored as: "hu", or "uint8" (an 8-bit PNG)."""
    size, stored = slice_header(path)
    if Path(path).suffix.lower() == ".npy":
        with np.errstate(over="ignore"):
            values = np.array(open_npy(path, ndim=2), dtype=np.float32)
        if not np.isfinite(values).all():
            raise DataError(f"{path}: values that are not finite")
        return values, stored
    values = decode_png(path, size).astype(np.float32)
    return values - hu_offset if stored == "hu" else values, stored


def read_mask(path):
    """One mask as uint8 (H, W): the pixels of an 8-bit grey PNG, or the indices of a palette PNG."""
    return decode_png(path, mask_size(path))


def slice_header(path):
    """(height, width) in px and "hu" or "uint8" (an 8-bit PNG), without reading the pixels."""
    if Path(path).suffix.lower() == ".npy":
        return open_npy(path, ndim=2).shape, "hu"
    size, depth, color = png_header(path)
    if color != "grey" or depth not in (8, 16):
        raise DataError(f"{path}: an 8- or 16-bit grey PNG is expected, this is {depth}-bit {color}")
    return size, "hu" if depth == 16 else "uint8"


def mask_size(path):
    """(height, width) in px of a mask, without reading the pixels."""
    size, depth, color = png_header(path)
    if color != "palette" and (color, depth) != ("grey", 8):
        raise DataError(
            f"{path}: an 8-bit grey or palette PNG is expected as a mask, this is {depth}-bit {color}"
        )
    return size


def mask_path(folder, name):
    """Where the mask of a slice lies in the masks folder."""
    return Path(folder) / (without_suffix(name) + ".png")


def default_window(stored):
    """The window meant by `auto`: soft tissue for HU, everything for 8-bit slices."""
    return (-160.0, 240.0) if stored == "hu" else (0.0, 255.0)


def png_header(path):
    """(height, width), bits a value, and the kind of colour; sizes are checked before anything is
    allocated."""
    try:
        with open(path, "rb") as file:
            start, length = file.read(26), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if len(start) < 26 or start[:8] != b"\x89PNG\r\n\x1a\n" or start[12:16] != b"IHDR":
        raise DataError(f"{path}: not a PNG image")
    width, height, depth, color = struct.unpack(">IIBB", start[16:])
    check_side(path, (height, width))
    if width * height > length * PIXELS_PER_BYTE:
        raise DataError(f"{path}: damaged, too short for the {height} x {width} px its header claims")
    return (height, width), depth, PNG_COLORS.get(color, "of an unknown colour type")


def decode_png(path, size):
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.size != size[::-1]:
                raise DataError("two headers")  # before it allocates what the second one says
            return np.array(image)
    except (
        Exception
    ) as error:  # OSError, SyntaxError, struct.error, zlib.error ...: whatever a damaged chunk causes
        raise DataError(f"{path}: damaged PNG ({one_line(error)})") from None


def open_npy(path, ndim):
    """The array of a .npy file, memory-mapped, of a real number type and with `ndim` dimensions."""
    try:
        with np.errstate(over="ignore"):  # of a shape in a damaged header; it is an error too
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or one_line(error)}") from None
    except Exception as error:  # numpy parses the header with ast and tokenize: many kinds of error
        raise DataError(f"{path}: damaged .npy ({one_line(error)})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise DataError(f"{path}: a .npy of real numbers is expected")
    if array.ndim != ndim:
        raise DataError(f"{path}: {ndim} dimensions are expected, not shape {array.shape}")
    check_side(path, array.shape[-2:])
    return array


def check_side(path, size):
    if min(size) < 1 or max(size) > MAX_SIDE:
        raise DataError(f"{path}: {size[0]} x {size[1]} px; 1 to {MAX_SIDE} a side can be read")


def one_line(message, longest=200):
    """A message, or an error, as a line for a terminal: not endless, and what cannot be printed escaped."""
    text = " ".join(str(message).split())[:longest] or type(message).__name__
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def write_png(path, array):
    """uint8 or uint16 (H, W) to a greyscale PNG, complete or not at all."""
    with written_whole(path, sync=False) as file:  # of thousands
        Image.fromarray(array).save(file, format="PNG", compress_level=3)


def read_json(path, kind):
    """The content of a JSON file, which must be of type `kind` (dict or list)."""
    if os.path.exists(path) and os.path.getsize(path) > MAX_JSON:
        raise DataError(f"{path}: too large, {os.path.getsize(path) >> 20} MB")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: a JSON {'object' if kind is dict else 'list'} is expected")
    return content


# ---- Lists and cases -----------------------------------------------------------------------------


class Strings(Sequence):
    """Many strings, immutable, in one block of memory that forked processes share.

    Of a list of a million str each makes a copy, page by page: reading a str writes its reference count.
    """

    def __init__(self, strings):
        text, ends = bytearray(), array("q", [0])
        for string in strings:
            text += string.encode("utf-8", "surrogatepass")
            ends.append(len(text))
        self.text, self.ends = bytes(text), ends

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return [self[i] for i in chosen]
        return self.text[self.ends[chosen] : self.ends[chosen + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self):
        for start, end in pairwise(self.ends):
            yield self.text[start:end].decode("utf-8", "surrogatepass")

    def __eq__(self, other):
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))


def checked(line, path):
    if len(line) > LONGEST_LINE:
        raise DataError(f"{path}: not a list, it has a line of more than {LONGEST_LINE} characters")
    return line


def read_list(path):
    """The slice names of a list file, as written there but for a second column, which is dropped.

    The name ends at .png or .npy; in a line without either, the last column goes unless it contains a "/".
    A path that leaves the images folder is a DataError; whether the files exist is not looked at.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = iter(lambda: file.readline(LONGEST_LINE + 1), "")
            names = [name_in(checked(line, path)) for line in lines if not line.isspace()]
    except FileNotFoundError:
        there = sorted(file.name for file in path.parent.glob("*.txt")) if path.parent.is_dir() else []
        raise DataError(f"{path}: no such list file (there: {', '.join(there[:8]) or 'none'})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file") from None
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path}: {getattr(error, 'strerror', error)}") from None
    if not names:
        raise DataError(f"{path}: the list is empty")
    for name in names:
        if name.startswith("/") or (".." in name and ".." in name.split("/")):
            raise DataError(
                f"{path}: {one_line(name)} leaves the data root; paths are relative to the images folder"
            )
        if "\\" in name or "\0" in name:
            raise DataError(f"{path}: {one_line(name)} has a backslash or a NUL; folders are separated by /")
    return names


def name_in(line):
    columns = line.split()
    if len(columns) == 1:  # as in most lists of a million lines
        return columns[0].removeprefix("./")
    line = line.strip().removeprefix("./")
    with_suffix = re.match(r".+?\.(png|npy)(?=\s|$)", line, re.IGNORECASE)
    if with_suffix:
        return with_suffix.group()
    columns = line.rsplit(maxsplit=1)
    return columns[0] if len(columns) == 2 and "/" not in columns[1] else line


def without_suffix(name):
    return name[:-4] if name.lower().endswith(SUFFIXES) else name


def case_of(name):
    """The case of a slice: its parent folder, unless that is a split folder (train, val, test ...) or
    there is none: then the file name up to its last number ("train/img0001_slice012" -> "img0001_slice")."""
    folder, _, file = name.rpartition("/")
    if folder and folder.rpartition("/")[2].lower() not in SPLIT_FOLDERS:
        return folder
    stem = without_suffix(file)
    before_number = re.match(r"(.*?)\d+\D*$", stem)
    if before_number is None:  # no number: a case of its own
        return stem
    return before_number.group(1).rstrip("_-. ") or folder or "case"


class Cases(Strings):
    """The cases of named slices, worked out when they are asked for."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        chosen = self.names[index]
        return case_of(chosen) if isinstance(chosen, str) else [*map(case_of, chosen)]

    def __iter__(self):
        return map(case_of, self.names)


def find_slices(folder, names):
    """The names with the suffixes that they have on disk; a name that is not there becomes None.

    Each folder is listed once, so that a million names cost seconds, not a million look-ups.
    """
    present = {}
    found = []
    for name in names:
        parent, _, file = name.rpartition("/")
        there = present.get(parent)
        if there is None:
            there = present[parent] = files_in(os.path.join(folder, parent))
        if file[-4:].lower() in SUFFIXES:
            found.append(name if file in there else None)
        else:
            endings = (ending for ending in (*SUFFIXES, "") if file + ending in there)
            found.append(next((name + ending for ending in endings), None))
    return found


def files_in(folder):
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):  # no such folder; ValueError: a name that cannot be one
        return set()


def all_slices(folder):
    """Every .png and .npy below a folder, as sorted names relative to it."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        relative = Path(parent).relative_to(folder)
        slices = (file for file in sorted(files) if file.lower().endswith(SUFFIXES) and file[0] != ".")
        names += [(relative / file).as_posix() for file in slices]
    if not names:
        raise DataError(f"{folder}: no .png or .npy slices there")
    return names


def split_folder(root, list, folder):
    """The images or masks folder of a list: "{split}" in it is the list's name without suffix."""
    return Path(root) / folder.replace("{split}", Path(list).stem if list else "")


def read_spacing(root):
    """{case: (slice, row, column) mm} from spacing.json beside the lists; empty without such a file."""
    path = Path(root) / "spacing.json"
    if not path.exists():
        return {}
    spacings = read_json(path, dict)
    for case, spacing in spacings.items():
        three = isinstance(spacing, list) and len(spacing) == 3
        if not three or not all(type(mm) in (int, float) and 0 < mm < MAX_SPACING for mm in spacing):
            raise DataError(
                f"{path}: {one_line(case)}: [slice, row, column] in mm is expected, not {one_line(spacing)}"
            )
    return {case: tuple(map(float, spacing)) for case, spacing in spacings.items()}


def class_names(root, classes=None):
    """The names of the classes, background first. `classes` is a list of them, or their number K
    (background, class 1 ... class K - 1), or None: classes.json beside the lists has them."""
    path = Path(root) / "classes.json"
    if isinstance(classes, int):
        classes = ["background"] + [f"class {index}" for index in range(1, classes)]
    if classes is None:
        if not path.exists():
            raise DataError(f"{path}: no such file; give the classes (a number, or names from background on)")
        classes = read_json(path, list)
    texts = all(isinstance(name, str) and name.isprintable() for name in classes)
    if not texts or not 2 <= len(set(classes)) == len(classes) <= IGNORE:
        raise DataError(
            f"{path}: 2 to {IGNORE} different class names are expected, background first, "
            f"not {one_line(str(classes))}"
        )
    return list(classes)


# ---- Packed sets ---------------------------------------------------------------------------------


class PackedSlices:
    """NAME.npy (N, H, W) int16, and NAME.json with the names and cases of the slices, spacing and source."""

    def __init__(self, path):
        self.path = path.with_name(path.name + ".npy")
        array = open_npy(self.path, ndim=3)
        if array.dtype != np.int16 or not array.flags.c_contiguous:
            raise DataError(f"{self.path}: a packed set is int16 in C order, this is {array.dtype}")
        self.shape, self.start = array.shape, array.offset
        about = path.with_name(path.name + ".json")
        content = read_json(about, dict)
        for key in ("names", "cases"):
            strings = content.get(key)
            if not isinstance(strings, list) or len(strings) != len(array) or {*map(type, strings)} - {str}:
                raise DataError(f"{about}: {key}: a list of {len(array)}, one for each slice, is expected")
        self.names, self.cases = Strings(content["names"]), Strings(content["cases"])
        self.stored = content.get("stored")
        if self.stored not in ("hu", "uint8"):
            raise DataError(f"{about}: stored: hu or uint8 is expected, not {self.stored}")

    def read(self, indices):
        """Yields the slices, float32 (H, W).

        They are read, not mapped: a process does not grow with the set, and a file that has become too
        short is an error with its name, not the end of the process.
        """
        slice = np.empty(self.shape[1:], np.int16)
        try:
            with open(self.path, "rb", buffering=0) as file:
                for index in indices:
                    file.seek(self.start + range(len(self.names))[index] * slice.nbytes)
                    if file.readinto(slice) < slice.nbytes:
                        raise DataError(f"{self.path}: too short, slice {index} is not there")
                    yield slice.astype(np.float32)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None


def packed_at(root):
    """The packed set that `root` names (with or without .npy or .json), or None."""
    path = Path(root)
    if path.is_dir():
        return None
    path = path.with_suffix("") if path.suffix in (".npy", ".json") else path
    return PackedSlices(path) if path.with_name(path.name + ".npy").is_file() else None


# ---- Writing a set -------------------------------------------------------------------------------


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


def in_threads(function, items, desc):
    """function(item) of every item, in order, by a few threads (zlib and file access run in parallel)."""
    items = list(items)
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(items), desc=desc, disable=None) as bar:
        for start in range(0, len(items), 64 * workers):
            for result in pool.map(function, items[start : start + 64 * workers]):
                bar.update()
                yield result
