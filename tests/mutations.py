"""Ways to damage a file, for test_corruption.py.

Each is a function of (rng, path, folder) that changes the file at `path`; `folder` holds other files to
confuse it with.
"""

import gzip
import json
import pickletools
import re
import shutil
import struct
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image

# fmt: off
# What YAML, JSON and lists can say instead of what is meant,
WORDS = [
    "null", "true", "-1", "0", "1.5", "1e400", "-.inf", ".nan", "NaN", "Infinity", "[]", "{}", "[1,2]",
    "[2,1]", "[[]]", "{a: 1}", "''", "~", "2001-99-99", "2001-12-14", "1:30", "0b", "0x_", "<<", "? [a]",
    "*nowhere", "&a", "&a [*a]", "%TAG", "!!timestamp x", "!!bool x", "!!int ''", "!!float x", "!!set {a}",
    "!!omap", "!!binary x", "!!python/object/apply:os.system [ls]", "'", '"', "{", "[", "-", "|", "@", "\t",
    "\0", "\x1b[2J", "\u202e", "\x85", "\u2028", "\x0b", "x", "é", "😀", "..", ".", "/", "../../etc/passwd",
    "/etc/passwd", "set", "9" * 5000, "1" + "0" * 400, "0x" + "f" * 5000, "x" * 5000, "x/" * 3000,
]
# nothing that could rightly take hours or gigabytes,
SMALL_WORDS = ["null", "true", "-1", "0", "1", "2", "3", "0.5", "1e-30", ".nan", ".inf", "[1,2]", "x", "''"]
# and what JSON and checkpoints can hold.
VALUES = [
    None, True, -1, 0, 7, 0.5, 1e308, float("nan"), float("inf"), 10**30, 10**400, -(2**63), "", "x", "\0",
    "1", "\ud800", "x" * 5000, "../x", [], {}, [[]], [1, 2, 3], [0.0, 0.0, 0.0], ["x"], {"": None},
    {"x": {"x": 1}},
]
NUMBERS = [
    0, 1, 2, 3, 4, 7, 8, 16, 64, 127, 128, 255, 256, 512, 1536, 1792, 8192, 8193, 2**15 - 1, 2**15, 60000,
    2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1,
]
CHUNKS = [b"IDAT", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"eXIf", b"IHDR", b"IEND", b"acTL", b"abcd"]
FLOATS = [0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"), -float("inf"), 352.5, 1e9]
NPY_SHAPES = [
    "()", "(2,)", "(-1, 4)", "(0, 0)", "(60000, 60000)", "(2**62, 4)", f"({'9' * 5000}, 1)", f"({2**62}, 4)",
    "(48, 48", "(1.5, 2)", "(True, 48)", "None", "((((", "(48, 48)", "(2304, 1)", "(9, 9, 9)",
]
NPY_TYPES = [
    "'<i2'", "'<i2'", "'|O'", "'<f8'", "'>i2'", "'V9999999'", "'<U100000'", "'<M8[s]'", "[('a', '<i2')]",
    "'<c16'", "'|b1'", "'x'", "7", "'<f2'", "'<g'",
]
ARRAY_SHAPES = [(48, 48), (48, 48), (), (0,), (0, 48), (48,), (3, 48, 48), (1, 1), (8193, 1), (47, 48)]
ARRAY_TYPES = ["i2", "i8", "u8", "f2", "f4", "f8", "c8", "?", "O", "U5", "S5", "M8[s]", "i2,f4", ">i2", "V3"]
VOLUME_SHAPES = [(12, 12, 10), (12, 12, 10), (12, 12), (12,), (12, 12, 10, 1), (12, 12, 10, 3), (1, 1, 1)]
VOXEL_TYPES = ["i2", "u1", "f4", "f8", "c8", "i4", "u2", "i8"]
# fmt: on
OPCODES = [ord(one.code) for one in pickletools.opcodes]


# ---- Any file ----


def flip_bits(rng, path, folder):
    data = bytearray(path.read_bytes())
    low, high = rng.choice([(0, 400), (max(0, len(data) - 400), len(data)), (0, len(data))])
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(low, min(high, len(data)))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut_short(rng, path, folder):
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice([0, 1, 8, 100, len(data) - 1, rng.randrange(len(data))])])


def overwrite(rng, path, folder):
    """Zeros or noise over a stretch of the file, between two of its bytes, or instead of it."""
    data = path.read_bytes()
    size, at = rng.choice([1, 16, 512, 4096]), rng.choice([0, rng.randrange(len(data)), len(data)])
    noise = rng.choice([bytes(size), rng.randbytes(size)])
    path.write_bytes(
        rng.choice([data[:at] + noise + data[at + size :], data[:at] + noise + data[at:], noise])
    )


def swap(rng, path, folder):
    others = sorted(file for file in folder.rglob("*") if file.is_file() and file != path)
    shutil.copyfile(rng.choice(others), path)


def not_a_file(rng, path, folder):
    path.unlink()
    rng.choice([lambda: None, path.mkdir, lambda: path.symlink_to(path.name)])()


ANY = [flip_bits, flip_bits, cut_short, cut_short, overwrite, swap, not_a_file]


# ---- Text ----


def replace_word(rng, path, folder, pattern=r'[^\s,:{}\[\]"]+', words=WORDS):
    text = path.read_text()
    word = rng.choice(list(re.finditer(pattern, text)))
    path.write_text(text[: word.start()] + rng.choice(words) + text[word.end() :])


def replace_value(rng, path, folder, words=WORDS):
    """A word that is not a key."""
    replace_word(rng, path, folder, r"(?<=: )[^\s,:{}\[\]]+", words)


def small_value(rng, path, folder):
    replace_value(rng, path, folder, SMALL_WORDS)


def replace_line(rng, path, folder):
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at : at + rng.choice([0, 1])] = rng.choices(WORDS, k=rng.choice([1, 1, 3]))
    path.write_text("\n".join(lines))


def repeat_lines(rng, path, folder):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(rng.choices(lines, k=rng.choice([1, len(lines), 20 * len(lines)]))))


def nest(rng, path, folder):
    depth = rng.choice([50, 1000, 20_000])
    start, end = rng.choice(["[]", ("{a: ", "}"), ('{"a": ', "}"), ("- ", ""), "(("])
    path.write_text(start * depth + end * rng.choice([0, depth]))


def encode(rng, path, folder):
    text = path.read_text()
    crlf, latin = text.replace("\n", "\r\n").encode(), (text + "é").encode("latin-1")
    path.write_bytes(
        rng.choice([text.encode("utf-16"), text.encode("utf-8-sig"), crlf, latin, text.encode() * 2])
    )


TEXT = [replace_word, replace_line, repeat_lines, nest, encode]


def places(content):
    """Every (container, key) of nested dicts and lists."""
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        if isinstance(value, dict | list):
            yield from places(value)


def change_json(rng, path, folder):
    """A value is another one or is not there; in one line of a .jsonl."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = rng.randrange(len(lines))
    content = json.loads(lines[at])
    container, key = rng.choice(list(places(content)))
    if rng.random() < 0.2:
        del container[key]
    else:
        container[key] = rng.choice(VALUES)
    lines[at] = json.dumps(rng.choice(VALUES) if rng.random() < 0.1 else content)
    path.write_text("\n".join(lines) + "\n")


# ---- Pictures, arrays, volumes ----


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(rng, path, folder):
    """One field of the header says something else; half of the time the checksum is right."""
    data = bytearray(path.read_bytes())
    at = rng.choice([16, 20, 24, 25, 26, 27, 28])
    size = 4 if at < 24 else 1
    data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "big")
    if rng.random() < 0.5:
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def more_png(rng, path, folder):
    """A chunk more, or instead of the picture, with a right checksum."""
    data = path.read_bytes()
    kind = rng.choice(CHUNKS)
    packed = b"a\0\0" + zlib.compress(bytes(10**7))
    chunk = png_chunk(kind, rng.choice([b"", rng.randbytes(20), packed, packed[3:]]))
    path.write_bytes(data[:33] + chunk + rng.choice([data[33:], data[-12:], b""]))


def other_picture(rng, path, folder):
    """A sound picture of another kind, size or content."""
    size = rng.choice([(48, 48), (48, 48), (48, 47), (1, 1), (1, 8192), (8193, 1), (1000, 1000)])
    mode = rng.choice(["1", "L", "L", "P", "LA", "RGB", "RGBA", "I;16"])
    noise = np.frombuffer(rng.randbytes(size[0] * size[1]), np.uint8).reshape(size[::-1])
    image = Image.new(mode, size, 3) if mode == "I;16" else Image.fromarray(noise).convert(mode)
    image.save(path, format=rng.choice(["PNG", "PNG", "PNG", "TIFF"]))


def jpeg_segment(rng, path, folder):
    """A byte of the tables and headers before the picture: sizes, samplings, Huffman codes, lengths."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 4])):
        data[rng.randrange(2, data.index(b"\xff\xda") + 12)] = rng.choice(NUMBERS) % 256
    path.write_bytes(data)


def tiff_tag(rng, path, folder):
    """The kind, type, count or value of an entry of the directory."""
    data = bytearray(path.read_bytes())
    at = int.from_bytes(data[4:8], "little")
    for _ in range(rng.choice([1, 1, 2])):
        entry = at + 2 + 12 * rng.randrange(int.from_bytes(data[at : at + 2], "little"))
        field, size = rng.choice([(0, 2), (2, 2), (4, 4), (8, 2), (8, 4), (8, 4)])
        number = rng.choice([rng.choice(NUMBERS), rng.randrange(254, 350), rng.randrange(8)])
        data[entry + field : entry + field + size] = (number % 256**size).to_bytes(size, "little")
    path.write_bytes(data)


def bmp_header(rng, path, folder):
    data = bytearray(path.read_bytes())
    at, size = rng.choice([(10, 4), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 4), (34, 4), (46, 4)])
    data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
    path.write_bytes(data)


def other_mode(rng, path, folder):
    """A sound picture of the same format, of another mode, size or compression, of several pages, turned."""
    format = {".jpg": "JPEG", ".tif": "TIFF", ".bmp": "BMP"}[path.suffix]
    modes = {"JPEG": ["L", "RGB", "CMYK"], "BMP": ["1", "L", "P", "RGB", "RGBA"]}
    mode = rng.choice(
        modes.get(format, ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F"])
    )
    size = rng.choice([(48, 48), (48, 48), (48, 47), (1, 1), (1, 8192), (8193, 1), (1000, 1000)])
    noise = np.frombuffer(rng.randbytes(size[0] * size[1]), np.uint8).reshape(size[::-1])
    image, options = Image.fromarray(noise).convert("RGB").convert(mode), {}
    if format == "TIFF" and mode not in ("I", "F"):
        options["compression"] = rng.choice([None, "tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd"])
        pages = rng.choice([0, 0, 1])
        options |= {"save_all": True, "append_images": [image] * pages}
    exif = Image.Exif()
    exif[274] = rng.choice([0, 1, 1, 3, 6, 9])
    image.save(path, format=format, **options, **({"exif": exif} if format == "JPEG" else {}))


def npy_header(rng, path, folder):
    order = rng.choice(["False", "False", "True", "7"])
    shape, dtype = rng.choice(NPY_SHAPES), rng.choice(NPY_TYPES)
    header = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    start = b"\x93NUMPY" + rng.choice([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\xff\0"])
    length = struct.pack("<H" if start[6] == 1 else "<I", rng.choice([len(header)] * 4 + [3, 65535]))
    path.write_bytes(start + length + header + path.read_bytes()[128:])


def other_array(rng, path, folder):
    array = np.zeros(rng.choice(ARRAY_SHAPES), rng.choice(ARRAY_TYPES))
    if array.dtype.kind in "iuf" and array.size and rng.random() < 0.7:
        real = array.dtype.kind == "f"
        limits = np.finfo(array.dtype) if real else np.iinfo(array.dtype)
        array.flat[rng.randrange(array.size)] = rng.choice([limits.min, limits.max, *[np.nan, np.inf] * real])
    with open(path, "wb") as file:
        np.save(file, np.asfortranarray(array) if rng.random() < 0.2 else array)


# Fields of a NIfTI-1 header: type and place. Sizes, data type and which of the two affines counts come often.
NIFTI_FIELDS = [("h", at) for at in range(40, 56, 2)] * 2 + [("h", 70), ("h", 72), ("h", 252), ("h", 254)] * 3
NIFTI_FIELDS += [("i", 0), ("h", 36), ("f", 108), ("f", 112), ("f", 116), ("b", 123), ("i", 344), ("i", 348)]
NIFTI_FIELDS += [("f", at) for at in (*range(76, 108, 4), *range(256, 328, 4))]


def nifti_header(rng, path, folder):
    packed = path.suffix == ".gz"
    data = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    for kind, at in rng.choices(NIFTI_FIELDS, k=rng.choice([1, 1, 2, 4])):
        size = struct.calcsize(kind)
        number = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        data[at : at + size] = struct.pack("<f", rng.choice(FLOATS)) if kind == "f" else number
    path.write_bytes(gzip.compress(data, 1) if packed else data)


def other_volume(rng, path, folder):
    import nibabel

    values = np.full(rng.choice(VOLUME_SHAPES), rng.choice([0, 1, 13, 200]), rng.choice(VOXEL_TYPES))
    if values.dtype.kind == "f":
        values.flat[:: rng.choice([1, 50])] = rng.choice([np.nan, np.inf, -np.inf, 0.5, 3e38])
    kind = rng.choice([nibabel.Nifti1Image, nibabel.Nifti1Image, nibabel.Nifti2Image])
    data = bytearray(kind(values, np.eye(4), dtype=values.dtype).to_bytes())
    if kind is nibabel.Nifti1Image and rng.random() < 0.5:
        affine = rng.choice([np.zeros((3, 4)), np.full((3, 4), np.nan), np.ones((3, 4)), 1e30 * np.eye(3, 4)])
        data[280:328] = affine.astype("<f4").tobytes()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


def dicom_element(rng, path, folder):
    """The text, the length, the kind or the tag of an element of the header."""
    data = bytearray(path.read_bytes())
    elements = [*re.finditer(rb"(?<=[\0-\xff]{4})(DS|IS|CS|UI|US|LO|SH)[\0-\xff]\0", data[132:1500])]
    for element in rng.choices(elements, k=rng.choice([1, 1, 1, 3])):
        at, length = 132 + element.end(), data[132 + element.end() - 2]
        text = bytes(rng.choices(b"0123456789.\\\\+-eE \0\xb2", k=length))
        words = [
            "",
            "nan",
            "1e400",
            "+-5",
            "0",
            "-1",
            "1\\0\\0\\0\\1\\0",
            "9" * length,
            "LOCALIZER",
            "PT",
            "²",
        ]
        word = rng.choice(words).encode("latin-1")[:length].ljust(length)
        field, new = rng.choice(
            [(0, text), (0, word), (0, word), (-2, rng.randbytes(1)), (-4, b"SQ"), (-6, b"\0\1")]
        )
        data[at + field : at + field + len(new)] = new
    path.write_bytes(data)


def itk_header(rng, path, folder):
    """A word of the text before the voxels of an NRRD or a MetaImage."""
    data = path.read_bytes()
    end = re.search(rb"\n\n|LOCAL\n", data).end()
    words = [*re.finditer(rb"[^\s:=,()]+", data[:end])]
    numbers = [str(number) for number in NUMBERS] + [str(number) for number in FLOATS]
    kinds = ["double", "MET_UCHAR", "gzip", "bzip2", "ascii", "True", "LIST", "../x.raw", "ct.nii", "block"]
    for word in rng.choices(words, k=rng.choice([1, 1, 2])):
        new = rng.choice([rng.choice(numbers), rng.choice(kinds), rng.choice(WORDS)]).encode(
            "utf-8", "replace"
        )
        data = data[: word.start()] + new + data[word.end() :]
    path.write_bytes(data)


# ---- Checkpoints ----


def change_torch(rng, path, folder):
    """Any one value: a number, a text, a tensor of another shape, type or content, nothing."""
    content = torch.load(path, weights_only=True)
    all_places = list(places(content))
    tensors = [(c, key) for c, key in all_places if isinstance(c[key], torch.Tensor)]
    others = [(c, key) for c, key in all_places if not isinstance(c[key], torch.Tensor)]
    container, key = rng.choice(rng.choice([tensors, others or tensors]))
    old = container[key] if isinstance(container[key], torch.Tensor) else torch.zeros(3)
    new = [old.flatten()[:0], old.flatten(), old.double(), old.cfloat(), old.bool(), old.to_sparse()]
    new += [torch.full_like(old.float(), value) for value in (torch.nan, torch.inf, 1e30)]
    new += [torch.zeros(()), torch.zeros(1).expand(10**5, 10**5)]
    if rng.random() < 0.2:
        del container[key]
    else:
        container[key] = rng.choice([rng.choice(new), rng.choice(VALUES)])
    torch.save(rng.choice([content] * 8 + [rng.choice(VALUES), [content], {"x": content}]), path)


def change_pickle(rng, path, folder):
    """The instructions of a zip file of torch.save are others; its checksums are right."""
    with zipfile.ZipFile(path) as old:
        files = {name: old.read(name) for name in old.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    data = bytearray(files[name])
    for _ in range(rng.choice([1, 1, 3, 20])):
        at, size = rng.randrange(len(data)), rng.choice([1, 1, 4, 50])
        other = rng.randrange(len(data))
        new = [
            rng.randbytes(size),
            rng.choices(OPCODES, k=size),
            data[other : other + size],
            b"",
            b"\xff" * size,
        ]
        data[at : at + rng.choice([0, size])] = bytes(rng.choice(new))
    with zipfile.ZipFile(path, "w") as archive:
        for one, content in files.items():
            archive.writestr(one, bytes(data) if one == name else content)


SMALL = [small_value]
YAML = [replace_value, replace_value, replace_word, replace_line, *TEXT, *ANY]
JSON = [change_json, change_json, change_json, change_json, *TEXT, *ANY]
LIST = [replace_line, replace_line, *TEXT, *ANY]
PNG = [png_header, png_header, more_png, other_picture, other_picture, *ANY]
JPEG = [jpeg_segment, jpeg_segment, jpeg_segment, other_mode, *ANY]
TIFF = [tiff_tag, tiff_tag, tiff_tag, tiff_tag, tiff_tag, other_mode, other_mode, *ANY]
BMP = [bmp_header, bmp_header, bmp_header, other_mode, *ANY]
NPY = [npy_header, npy_header, npy_header, other_array, other_array, *ANY]
DICOM = [dicom_element, dicom_element, dicom_element, dicom_element, *ANY]
ITK = [itk_header, itk_header, itk_header, itk_header, *ANY]
NIFTI = [nifti_header, nifti_header, nifti_header, other_volume, other_volume, *ANY]
TORCH = [change_torch, change_torch, change_torch, *ANY]
FOREIGN = [change_pickle, change_pickle, change_pickle, *ANY]
