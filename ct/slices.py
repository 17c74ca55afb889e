"""One slice, one mask: pictures of 8 and 16 bits, .npy in HU; what they may hold, how they are read and
written.

Every problem with a file raises `DataError`, one line that names the file.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ct.raster import MAX_SIDE, DataError, check_side, grey_pixels, header, pixels  # noqa: F401
from engine.config import one_line
from engine.files import written_whole

IGNORE = 255  # the mask value of pixels that neither train nor count
AIR = {"hu": -1024.0, "uint8": 0.0, "stored": 0.0}  # what fills a slice that is brought to the common size
PICTURES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
SUFFIXES = (".png", ".npy", *PICTURES[1:])  # of several files with one name the first is meant


def read_slice(path, hu_offset=1024):
    """One slice as float32 (H, W) in HU. 16-bit picture: value - hu_offset; .npy: the value; 8-bit picture:
    the value, whatever it means."""
    return read_stored(path, hu_offset)[0]


def read_stored(path, hu_offset=1024):
    """A slice as `read_slice` gives it, and what it is stored as: "hu", or "uint8" (an 8-bit picture)."""
    if is_npy(path):
        with np.errstate(over="ignore"):
            values = np.array(open_npy(path, ndim=2), dtype=np.float32)
        if not np.isfinite(values).all():
            raise DataError(f"{path}: values that are not finite")
        return values, "hu"
    picture = header(path)
    stored = stored_as(path, picture)
    values = grey_pixels(path, picture).astype(np.float32)
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
    """One mask as uint8 (H, W): the pixels of an 8-bit grey PNG, TIFF or BMP, or the indices of its palette.

    mapping: {pixel value or (red, green, blue): class}, see `mask_mapping`. Grey values that it does not name
    stay, colours are an error. With colours in it, the pixels of a palette are colours, too.
    """
    picture = mask_header(path, mapping)
    if not mapping:
        return pixels(path, picture)
    colors = picture.color.startswith("RGB") or any(isinstance(key, tuple) for key in mapping)
    mask = pixels(path, picture, "RGB" if colors else None)
    if mask.ndim == 2:
        table = np.arange(256, dtype=np.uint8)
        table[[*mapping]] = [*mapping.values()]
        return table[mask]
    codes = mask.astype(np.int32) @ [1 << 16, 1 << 8, 1]
    classes = np.zeros(picture.size, np.uint8)
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
    """(height, width) in px and "hu" or "uint8" (an 8-bit picture), without reading the pixels."""
    if is_npy(path):
        return open_npy(path, ndim=2).shape, "hu"
    picture = header(path)
    return picture.size, stored_as(path, picture)


def is_npy(path):
    return Path(path).suffix.lower() == ".npy"


def stored_as(path, picture):
    """ "hu" or "uint8". Whether what is stored in colours is grey shows only in its pixels."""
    if (picture.depth, picture.color) == (16, "grey"):
        return "hu"
    colored = picture.color in ("RGB", "RGB with alpha", "grey with alpha")
    if picture.color == "palette" or (picture.depth == 8 and (colored or picture.color == "grey")):
        return "uint8"
    raise DataError(f"{path}: 8- or 16-bit grey is expected, this is a {picture}; save it so, or HU as .npy")


def mask_header(path, mapping=None):
    picture = header(path)
    if picture.lossy:
        raise DataError(f"{path}: a JPEG is lossy and keeps no labels; save the mask anew, as PNG")
    colored = picture.color in ("RGB", "RGB with alpha") and picture.depth == 8
    grey = (picture.depth, picture.color) == (8, "grey")
    if picture.color != "palette" and not grey and not (mapping and colored):
        mend = "; data.mask_map={'255,0,0': 1} maps colours" if colored else "; save it with 8 bits"
        raise DataError(f"{path}: a mask is an 8-bit grey or palette picture, this is a {picture}{mend}")
    return picture


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
