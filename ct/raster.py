"""Pictures as files: PNG, JPEG, TIFF and BMP, told apart by their first bytes, not by their suffix.

    header(path)                what a file claims, checked before any memory is allocated
    pixels(path, header)        the values as they are
    grey_pixels(path, header)   the grey values of what is grey, also where it is stored as colours

What their values mean is decided in ct/slices.py. Every problem raises `DataError`, one line with the file.
"""

import ctypes
import os
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from engine.config import one_line

MAX_SIDE = 8192  # px; a header that claims more is refused before any memory is allocated
START = 4096  # bytes, in which a PNG says how it is turned if it does
PIXELS_PER_BYTE = 8 * 1032  # of a picture, at most: deflate shrinks by no more than 1032 to 1
JPEG_ROUNDING = 4  # by which the channels of a grey JPEG may differ: one level of either chroma makes 3
FORMATS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP"}
FORMATS |= dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF")
PNG_COLORS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
MODES = {  # of Pillow: bits a value, and the kind of colour
    "1": (1, "grey"),
    "L": (8, "grey"),
    "LA": (8, "grey with alpha"),
    "P": (8, "palette"),
    "RGB": (8, "RGB"),
    "RGBA": (8, "RGB with alpha"),
    "I": (32, "signed"),
    "F": (32, "float"),
}
MODES |= dict.fromkeys(("I;16", "I;16B", "I;16L"), (16, "grey"))
BITS, COMPRESSION, PHOTOMETRIC = 258, 259, 262  # tags of TIFF
JPEG_INSIDE, WHITE_IS_ZERO = (6, 7), 0  # and values of the last two

# Of a damaged file it is an error that says so, or a second header is warned of: we check the first.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.simplefilter("error", Image.DecompressionBombWarning)
with suppress(OSError, AttributeError):  # a Pillow without libtiff; it would print a line of its own for each
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class DataError(ValueError):
    """Data that cannot be used; the message is one line with the file and the reason."""


@dataclass(frozen=True)
class Header:
    """Of a picture: size (height, width) in px, bits a value, the kind of colour; lossy: by JPEG."""

    format: str
    size: tuple
    depth: int
    color: str
    lossy: bool = False

    def __str__(self):
        return f"{self.depth}-bit {self.color} {self.format}"


def header(path):
    """The Header of a picture, without reading its pixels. Raises DataError, also for what is no single
    upright picture: several pages, an EXIF orientation, a TIFF whose white is zero."""
    try:
        with open(path, "rb") as file:
            start, length = file.read(START), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    format = next((format for magic, format in FORMATS.items() if start.startswith(magic)), None)
    if format is None:
        raise DataError(f"{path}: not a PNG, JPEG, TIFF or BMP image")
    found = png_header(path, start) if format == "PNG" else pillow_header(path, format)
    check_side(path, found.size)
    height, width = found.size
    if width * height > length * PIXELS_PER_BYTE:
        raise DataError(f"{path}: damaged, too short for the {height} x {width} px its header claims")
    return found


def png_header(path, start):
    if len(start) < 26 or start[:8] != b"\x89PNG\r\n\x1a\n" or start[12:16] != b"IHDR":
        raise DataError(f"{path}: not a PNG image")
    width, height, depth, color = struct.unpack(">IIBB", start[16:26])
    if b"eXIf" in start:
        pillow_header(path, "PNG")  # which refuses what is turned
    return Header("PNG", (height, width), depth, PNG_COLORS.get(color, "of an unknown colour type"))


def pillow_header(path, format):
    try:
        with Image.open(path, formats=(format,)) as image:
            tags = getattr(image, "tag_v2", {})
            depth, color = MODES.get(image.mode, (8, image.mode))
            if tags and depth != 16:  # Pillow halves 16-bit colours
                depth = max(tags.get(BITS, (1,)))
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            pages = getattr(image, "is_animated", False)
            white_is_zero = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
            lossy = format == "JPEG" or tags.get(COMPRESSION) in JPEG_INSIDE
            found = Header(format, image.size[::-1], depth, color, lossy)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{path}: too large; 1 to {MAX_SIDE} px a side can be read") from None
    except Exception as error:  # as in `pixels`
        raise DataError(f"{path}: damaged {format}, or of an unknown kind ({one_line(error)})") from None
    if pages:
        raise DataError(f"{path}: a {format} of several pages; save each as a file of its own")
    if orientation not in (0, 1):
        raise DataError(f"{path}: turned or mirrored by its EXIF orientation; save it upright, without one")
    if white_is_zero:
        raise DataError(f"{path}: a TIFF in which white is zero; save it with black as zero")
    return found


def pixels(path, header, mode=None):
    """The values of a picture, (H, W), or (H, W, channels) of Pillow's `mode` ("RGB", "RGBA"); a palette
    without a mode: its indices."""
    try:
        with Image.open(path, formats=(header.format,)) as image:
            if image.size != header.size[::-1]:
                raise DataError("two headers")  # before it allocates what the second one says
            return np.array(image.convert(mode) if mode else image)
    except Exception as error:
        # OSError, SyntaxError, struct.error, zlib.error ...: whatever a damaged part causes
        raise DataError(f"{path}: damaged {header.format} ({one_line(error)})") from None


def grey_pixels(path, header):
    """The values of a grey picture, (H, W); stored in colours (also of a palette) it is grey if the channels
    are equal, in a JPEG within JPEG_ROUNDING. Transparency goes if it is the same everywhere.

    Raises DataError for real colour, with a pixel of it.
    """
    if header.color == "grey":
        return pixels(path, header)
    red, green, blue, alpha = np.moveaxis(pixels(path, header, "RGBA"), -1, 0)
    apart = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    if apart.max() > (JPEG_ROUNDING if header.lossy else 0):
        row, column = (int(i) for i in np.unravel_index(apart.argmax(), apart.shape))
        color = tuple(int(channel[row, column]) for channel in (red, green, blue))
        raise DataError(f"{path}: in colour, such as {color} in row {row}, column {column}; grey is expected")
    if alpha.min() < alpha.max():
        raise DataError(f"{path}: transparent in places; save it without transparency")
    return green  # of the three nearest to the luma, if they differ


def check_side(path, size):
    if min(size) < 1 or max(size) > MAX_SIDE:
        raise DataError(f"{path}: {size[0]} x {size[1]} px; 1 to {MAX_SIDE} a side can be read")
