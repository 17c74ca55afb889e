"""One slice, one mask: 8- and 16-bit PNG, .npy in HU; what they may hold, how they are read and written.

Every problem with a file raises `DataError`, one line that names the file.
"""

import os
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
AIR = {"hu": -1024.0, "uint8": 0.0}  # what fills a slice that is brought to the common size
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


def write_png(path, array, made_by=None):
    """uint8 or uint16 (H, W) to a greyscale PNG, complete or not at all; made_by: see written_whole."""
    with written_whole(path, sync=False, made_by=made_by) as file:  # of thousands
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
