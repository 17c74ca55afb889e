"""One slice, one mask: 8- and 16-bit PNG, .npy in HU; what they may hold, how they are read and written.

Every problem with a file raises `DataError`, one line that names the file.
"""

import os
import re
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine.config import one_line
from engine.files import written_whole

IGNORE = 255  # the mask value of pixels that neither train nor count
MAX_SIDE = 8192  # px; a header that claims more is refused before any memory is allocated
PIXELS_PER_BYTE = 8 * 1032  # of a PNG, at most: deflate shrinks by no more than 1032 to 1
AIR = {"hu": -1024.0, "uint8": 0.0, "stored": 0.0}  # what fills a slice that is brought to the common size
PNG_COLORS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
SUFFIXES = (".png", ".npy")

# Of a damaged PNG it is an error that says so. The second warning is of a second header: we check the first.
warnings.filterwarnings("ignore", module=r"PIL\.PngImagePlugin")
warnings.simplefilter("error", Image.DecompressionBombWarning)


class DataError(ValueError):
    """Data that cannot be used; the message is one line with the file and the reason."""


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


def whole_hu(values):
    """HU as 16-bit PNGs keep them, float32 of the same shape: whole numbers, air (-1024) for NaN and whatever
    lies below."""
    return (
        np.rint(np.nan_to_num(values, nan=-1024.0, posinf=-1024.0, neginf=-1024.0))
        .clip(-1024, 64511)
        .astype(np.float32)
    )


def read_mask(path, mapping=None):
    """One mask as uint8 (H, W): the pixels of an 8-bit grey PNG, or the indices of a palette PNG.

    mapping: {pixel value or (red, green, blue): class}, see `mask_mapping`. Grey values that it does not name
    stay, colours are an error. With colours in it, the pixels of a palette are colours, too.
    """
    size = mask_size(path, mapping)
    if not mapping:
        return decode_png(path, size)
    colors = any(isinstance(key, tuple) for key in mapping)
    mask = decode_png(path, size, colors)
    if mask.ndim == 2:
        table = np.arange(256, dtype=np.uint8)
        table[[*mapping]] = [*mapping.values()]
        return table[mask]
    codes = mask[..., :3].astype(np.int32) @ [1 << 16, 1 << 8, 1]
    classes = np.zeros(size, np.uint8)
    for code in np.unique(codes):
        color = (int(code) >> 16, int(code) >> 8 & 255, int(code) & 255)
        grey = color[0] if len({*color}) == 1 else None  # a grey value stored as a colour
        found = mapping.get(color, mapping.get(grey, grey))
        if found is None:
            raise DataError(f"{path}: the colour {color}, which data.mask_map does not name")
        classes[codes == code] = found
    return classes


def mask_mapping(given):
    """data.mask_map as `read_mask` takes it: {255: 1, "255,0,0": 2, "#00ff00": 3} -> {255: 1, (255, 0, 0): 2,
    (0, 255, 0): 3}. Raises DataError for anything else."""
    mapping = {}
    for key, target in (given or {}).items():
        text = str(key).strip()
        parts = re.findall("..", text[1:]) if re.fullmatch("#[0-9a-fA-F]{6}", text) else text.split(",")
        base = 16 if text.startswith("#") else 10
        try:
            values = tuple(int(part, base) for part in parts)
        except ValueError:
            values = ()
        if len(values) not in (1, 3) or not all(0 <= value <= 255 for value in values):
            raise DataError(
                f"data.mask_map: {one_line(text)}: a value 0 to 255, or a colour: 255,0,0 or #ff0000"
            )
        if type(target) is not int or not 0 <= target <= IGNORE:
            raise DataError(
                f"data.mask_map: {one_line(text)}: a class 0 to 254, or 255, not {one_line(target)}"
            )
        mapping[values if len(values) == 3 else values[0]] = target
    return mapping


def slice_header(path):
    """(height, width) in px and "hu" or "uint8" (an 8-bit PNG), without reading the pixels."""
    if Path(path).suffix.lower() == ".npy":
        return open_npy(path, ndim=2).shape, "hu"
    size, depth, color = png_header(path)
    if color != "grey" or depth not in (8, 16):
        raise DataError(f"{path}: an 8- or 16-bit grey PNG is expected, this is {depth}-bit {color}")
    return size, "hu" if depth == 16 else "uint8"


def mask_size(path, mapping=None):
    """(height, width) in px of a mask, without reading the pixels."""
    size, depth, color = png_header(path)
    colored = color in ("RGB", "RGB with alpha") and depth == 8
    if color != "palette" and (color, depth) != ("grey", 8) and not (mapping and colored):
        mend = "; data.mask_map={'255,0,0': 1} maps colours" if colored else "; save it with 8 bits"
        raise DataError(
            f"{path}: an 8-bit grey or palette PNG is expected as a mask, this is {depth}-bit {color}{mend}"
        )
    return size


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


def decode_png(path, size, colors=False):
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.size != size[::-1]:
                raise DataError("two headers")  # before it allocates what the second one says
            return np.array(image.convert("RGB") if colors else image)
    except Exception as error:
        # OSError, SyntaxError, struct.error, zlib.error ...: whatever a damaged chunk causes
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


def write_png(path, array, made_by=None, record=None):
    """uint8 or uint16 (H, W) to a greyscale PNG, whole or not at all; made_by, record: see written_whole."""
    with written_whole(path, sync=False, made_by=made_by, record=record) as file:  # of thousands
        Image.fromarray(array).save(file, format="PNG", compress_level=3)


def in_threads(function, items, desc):
    """function(item) of every item, in order, by a few threads (zlib and file access run in parallel)."""
    items = list(items)
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(items), desc=desc, disable=None) as bar:
        for start in range(0, len(items), 64 * workers):
            for result in pool.map(function, items[start : start + 64 * workers]):
                bar.update()
                yield result
