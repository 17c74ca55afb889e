"""DICOM series, NRRD and MetaImage as nibabel's images, so that everything else knows one kind of volume.

find_series     the CT series among DICOM files, one Series each; in words what was left out
open_scan       header and grid of a file or a series; voxels are read when they are asked for

SimpleITK is needed here and nowhere else (pip install SimpleITK); it also reads compressed DICOM. Of a DICOM
header only what says where pixels lie is looked at, and the patient's ID, of which a hash is kept: names and
dates of patients go nowhere.
"""

import filecmp
import glob
import mmap
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from ct.listing import SCANS, files_below
from ct.series import FEWEST, TELLING, UNEVEN, by_place, hashed, numbers, volumes_of, whole
from ct.slices import AIR, MAX_SIDE, DataError
from engine.config import one_line

INFLATION = 1032  # the most that deflate can do
REMEMBERED = 100_000  # headers, of about 1 kB each
TO_RAS = np.diag([-1.0, -1, 1, 1])  # DICOM and ITK count towards the patient's left and back
TAGS = {
    "series": "0020|000e",
    "modality": "0008|0060",
    "kind": "0008|0008",
    "patient": "0010|0020",
    "shown as": "0028|0004",
    "allocated": "0028|0100",
    "stored": "0028|0101",
    "signed": "0028|0103",
    "padding": "0028|0120",
    "padding limit": "0028|0121",
    "acquisition": "0020|0012",
    "number": "0020|0013",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "spacing": "0028|0030",
    "frames": "0028|0008",
    "intercept": "0028|1052",
    "slope": "0028|1053",
}


def import_simpleitk():
    try:
        import SimpleITK
    except ImportError:
        raise DataError("DICOM, NRRD and MetaImage files need SimpleITK: pip install SimpleITK") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what is wrong is raised, or judged here
    return SimpleITK


@contextmanager
def reading(path):
    """Around SimpleITK: its errors become a DataError, and what it writes to stderr itself is dropped."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except (RuntimeError, TypeError, ValueError, MemoryError):
        raise DataError(f"{path}: not a readable volume, or damaged") from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# ---- Which files are series of a CT --------------------------------------------------------------


# An element of a first group: tag, and length, with the kind of value written before it or without.
ELEMENT = re.compile(rb"([\x02\x08]\0.\0)(?:(?:OB|OW|SQ|UN|UT)\0\0(.{4})|[A-Z][A-Z](..)|(..\0\0))", re.DOTALL)


def is_dicom(path):
    """By the mark of the format, 128 bytes from the start or there; without it, by two elements."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError:
        return False
    return b"DICM" in (start[128:132], start[:4]) or begins_with_elements(start)


def begins_with_elements(start):
    """With two of the group 0002 or 0008 in their order, which random bytes hardly do."""
    tag, at = b"", 0
    for _ in range(2):
        found = ELEMENT.match(start, at)
        if not found or found[1] <= tag:
            return False
        tag, at = found[1], found.end() + int.from_bytes(found[2] or found[3] or found[4], "little")
    return True


def find_series(files):
    """The CT series among DICOM files, as [Series], and [what was left out and why]. Files of one folder,
    patient and UID come apart as volumes_of says."""
    groups, left_out, found = defaultdict(list), Counter(), []
    for path in files:
        header = read_header(path)
        if reason := not_a_slice(header):
            left_out[reason] += 1
        else:
            groups[path.parent, header["patient"], header["series"]].append((path, header))
    for members in groups.values():
        for series in volumes_of(members, are_copies):
            if max(len(by_place(series.slices)), read_header(series.path)["frames"]) < FEWEST:
                left_out[f"in series of fewer than {FEWEST} places"] += len(series.slices)
            else:
                found.append(series)
    return found, [
        f"{count} {'file' if count == 1 else 'files'}: {reason}" for reason, count in left_out.items()
    ]


def are_copies(path, other):
    """Whether two files hold the same pictures, as after a second download, which may change other bytes."""
    if filecmp.cmp(path, other, shallow=False):
        return True
    with suppress(DataError):
        return np.array_equal(read_hu(path), read_hu(other))
    return False


def read_header(path):
    """{name in TAGS: text, "size": (columns, rows)} of a DICOM file; {} if it holds no picture."""
    about = os.stat(path)
    return header_as_of(path, about.st_size, about.st_mtime_ns)


@lru_cache(REMEMBERED)  # each series of a folder asks for the headers of all files there
def header_as_of(path, size, mtime_ns):
    sitk = import_simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        with reading(path), as_gdcm_reads(path) as file:
            reader.SetFileName(str(file))
            reader.ReadImageInformation()
            wanted = {*TAGS.values(), *chain(*TELLING.values())}.intersection(reader.GetMetaDataKeys())
            texts = {tag: sys.intern(reader.GetMetaData(tag).strip()) for tag in wanted}
    except DataError:  # a report, a presentation state, or damaged
        return {}
    header = {name: texts.get(tag, "") for name, tag in TAGS.items()}
    header["told"] = tuple(
        sys.intern("".join(texts.get(tag, "") for tag in tags)) for tags in TELLING.values()
    )
    header["size"], header["grey"] = reader.GetSize()[:2], reader.GetNumberOfComponents() == 1
    header["patient"] = header["patient"] and hashed(header["patient"])
    header["frames"] = whole(header["frames"], 1)
    if header["frames"] > 1:
        apart, places = abs(reader.GetSpacing()[-1]), of_frames(path, "position")
        scales = {name: of_frames(path, name) for name in ("slope", "intercept")}
        header["frames apart"] = are_evenly_apart(places, header["frames"], apart)
        header["frames alike"] = all(len({*found}) < 2 for found in scales.values())
        header |= {name: found[0] for name, found in scales.items() if found}
    return header


def of_frames(path, name):
    """The texts of an element in a file of many frames, frame by frame. SimpleITK keeps to itself what stands
    in sequences, and takes what the first frame says for all of them: hence a look at the file's bytes."""
    group, element = (bytes.fromhex(half)[::-1] for half in TAGS[name].split("|"))
    length = rb"(?:DS..|..\0\0)"  # with the kind of value written before it, or without
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.findall(re.escape(group + element) + length + rb"([-+.\d eE\\]+)", content, re.DOTALL)
    return [text.decode().strip() for text in found]


def are_evenly_apart(positions, count, spacing):
    """Whether the positions of `count` frames run along a line, each `spacing` mm from the one before."""
    places = [numbers(text, 3) for text in positions]
    if len(places) != count or None in places:
        return False
    steps = np.diff(places, axis=0)
    off = np.abs(steps - steps.mean(0)).max(), abs(np.linalg.norm(steps[0]) - spacing)
    return max(off) < UNEVEN * spacing


def not_a_slice(header):
    """Why a file is none, or None."""
    if not header:
        return "no picture (reports, presentation states) or damaged"
    if header["modality"] not in ("CT", ""):
        return f"{one_line(header['modality'][:16])}, not CT"
    if "LOCALIZER" in header["kind"].upper():
        return "localizers"
    if not header["grey"]:
        return "in colour (secondary captures)"
    if max(header["size"]) > MAX_SIDE:
        return f"of more than {MAX_SIDE} px a side"
    if header["frames"] == 1 and not (numbers(header["position"], 3) and numbers(header["orientation"], 6)):
        return "without a place in the patient (secondary captures)"
    if header["frames"] == 1 and min(numbers(header["spacing"], 2) or (0,)) <= 0:
        return "without the distance of their pixels"
    if header["frames"] > 1 and not header["frames apart"]:
        return "of many frames that are not in the order of evenly spaced places (dcm2niix converts them)"
    if header["frames"] > 1 and not header["frames alike"]:
        return "of many frames that are rescaled differently (dcm2niix converts them)"
    return None


# ---- As nibabel's images -------------------------------------------------------------------------


class Voxels:
    """(X, Y, Z) voxels that are read when they are asked for; what nibabel calls a data object."""

    def __init__(self, shape, dtype, read):
        self.shape, self.dtype, self.ndim, self.read = shape, np.dtype(dtype), len(shape), read

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.read(), dtype)

    def __getitem__(self, index):
        return np.asarray(self)[index]


def open_scan(nibabel, path):
    """nibabel's image of a .nrrd, .mha or .mhd, or of the DICOM series that a file belongs to, and [Doubt].

    A gantry's tilt stays in its affine, in which slices are set off against each other. Raises DataError.
    """
    if is_named_scan(path):
        return open_file(nibabel, path), []
    own = series_of(path)
    image = open_file(nibabel, path, "GDCMImageIO") if len(own.slices) == 1 else open_series(nibabel, own)
    return image, [*own.doubts]


def series_of(path):
    """The Series of a DICOM file. Raises DataError if it belongs to none that can be read."""
    uid, beside = read_header(path).get("series"), dicom_files(path.parent, deep=False)
    series, left_out = find_series(file for file in beside if read_header(file).get("series") == uid)
    own = next((one for one in series if path in [slice.path for slice in one.slices]), None)
    if own is None:
        why = "; ".join(left_out) or "another file has its place"
        raise DataError(f"{path}: not a slice of a CT series of {FEWEST} slices or more ({why})")
    if own.failure:
        raise DataError(own.failure)
    return own


def dicom_files(folder, deep=True):
    return [folder / name for name in files_below(folder, "", deep) if is_dicom(folder / name)]


def is_named_scan(path):
    return path.name.lower().endswith(SCANS)


def open_series(nibabel, series):
    first, last = series.slices[0], series.slices[-1]
    count = len(series.slices)
    affine = np.eye(4)
    affine[:3, 0] = np.multiply(first.turned[:3], first.spacing[0])
    affine[:3, 1] = np.multiply(first.turned[3:], first.spacing[1])
    way = np.subtract(last.position, first.position)
    steps = np.diff([one.place for one in series.slices])
    affine[:3, 2] = way / np.sum(steps) * np.median(steps)
    affine[:3, 3] = first.position

    def read():
        voxels = np.empty((*first.size, count), np.int16, order="F")  # slice after slice
        for index, one in enumerate(series.slices):
            pixels = read_hu(one.path)
            if pixels.shape != (1, *first.size[::-1]):
                raise DataError(f"{one.path}: {pixels.shape} pixels for the {first.size} of its header")
            if voxels.dtype == np.int16 and not fits_int16(pixels):
                voxels = voxels.astype(np.float32)
            voxels[:, :, index] = pixels[0].T
        return voxels

    return as_nifti(nibabel, Voxels((*first.size, count), np.float32, read), TO_RAS @ affine)


def read_hu(path):
    """(frames, rows, columns) of a DICOM file: stored value x slope + intercept, and padding as air."""
    sitk, header = import_simpleitk(), read_header(path)
    with as_gdcm_reads(path, header["shown as"]) as file, reading(path):
        pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(file), imageIO="GDCMImageIO"))
    if not header["padding"]:
        return pixels
    low, high, air = padding_of(header)
    return np.where((low <= pixels) & (pixels <= high), np.int16(air), pixels)


MONOCHROME1 = re.compile(rb"((?:\x28\0\x04\0|\0\x28\0\x04).{4}MONOCHROME)1", re.DOTALL)


@contextmanager
def as_gdcm_reads(path, shown_as=""):
    """The path, or that of a copy, which has the 128 bytes that go before the mark of the format, or says
    MONOCHROME2: MONOCHROME1 is how values are shown, not what they are, but GDCM would turn them over."""
    with open(path, "rb") as file:
        starts_with_mark = file.read(4) == b"DICM"
    if not starts_with_mark and shown_as != "MONOCHROME1":
        yield path
        return
    content = bytes(128) * starts_with_mark + path.read_bytes()
    if shown_as == "MONOCHROME1":
        content, count = MONOCHROME1.subn(rb"\g<1>2", content)
        if not count:
            raise DataError(f"{path}: MONOCHROME1 in a deflated file is not read; convert it with dcm2niix")
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        file.write(content)
        file.flush()
        yield file.name


def padding_of(header):
    """(low, high, air) in HU: values between the first two are padding, by its tag and that of the limit."""
    slope, intercept = ((numbers(header[name], 1) or (0,))[0] for name in ("slope", "intercept"))
    slope = slope or 1.0  # as GDCM takes it
    ends = [stored_value(header[name], header) for name in ("padding", "padding limit") if header[name]]
    ends = [value * slope + intercept for value in ends]
    no_hu = header["signed"] != "1" and intercept >= 0  # which would all be above 0
    return min(ends) - abs(slope) / 2, max(ends) + abs(slope) / 2, 0 if no_hu else AIR["hu"]


def stored_value(text, header):
    """The number of an element that may be written with the sign of the pixels or without."""
    value = whole(text, 0)
    if header["signed"] != "1":
        return value % 2 ** whole(header["allocated"], 16)
    half = 2 ** (whole(header["stored"], 16) - 1)
    return (value + half) % (2 * half) - half


def fits_int16(pixels):
    limits = np.iinfo(np.int16)
    return limits.min <= pixels.min() and pixels.max() <= limits.max and (np.rint(pixels) == pixels).all()


def open_file(nibabel, path, io=None):
    """One file of a volume, as SimpleITK's `io` reads it: GDCMImageIO for DICOM; None: by its name."""
    sitk = import_simpleitk()
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    if io:
        reader.SetImageIO(io)
    else:
        refuse_by_header(path)
    with reading(path):
        reader.ReadImageInformation()
        shape, components = reader.GetSize(), reader.GetNumberOfComponents()
        affine = np.eye(4)
        if len(shape) >= 3:
            cosines = np.reshape(reader.GetDirection(), (len(shape), -1))[:3, :3]
            affine[:3, :3] = cosines * np.array(reader.GetSpacing()[:3])
            affine[:3, 3] = reader.GetOrigin()[:3]
        one = sitk.Image([1] * 2, reader.GetPixelID(), components)
        dtype = sitk.GetArrayViewFromImage(one).dtype if components == 1 else None
    check_header(path, shape, dtype)

    def read():
        if io:
            return read_hu(path).T
        with reading(path):
            return sitk.GetArrayFromImage(reader.Execute()).T

    return as_nifti(nibabel, Voxels(tuple(shape), dtype, read), TO_RAS @ affine)


def refuse_by_header(path):
    """DataError if the header of an NRRD or MetaImage names the file of its voxels and that is not one beside
    it, or if it is packed by bzip2, which SimpleITK would call damaged."""
    with open(path, "rb") as file:
        lines = file.read(65536).split(b"\n\n")[0].decode("latin-1").splitlines()
    for line in lines:
        key, _, value = line.replace(":", "=", 1).partition("=")
        key, value = key.strip().lower(), value.strip()
        if key == "encoding" and value.lower() in ("bzip2", "bz2"):
            raise DataError(f"{path}: packed by bzip2, which is not read; save it with the encoding gzip")
        if key not in ("elementdatafile", "data file", "datafile") or value.lower() == "local":
            continue
        if Path(value).name != value or not (path.parent / value).is_file():
            found = f"its voxels should be in {one_line(value)}, which is no file beside it"
            raise DataError(f"{path}: {found}")


def check_header(path, shape, dtype):
    """Before any voxel is read: three dimensions of real numbers, no more of them than files can hold."""
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or dtype is None or dtype.kind not in "iuf":
        what = "" if dtype and dtype.kind in "iuf" else " of colours or vectors"
        text = f"a volume of three dimensions of numbers is expected, this one has shape {tuple(shape)}{what}"
        raise DataError(f"{path}: {text}; save the one that is meant alone")
    if min(shape) < 1 or max(shape) > MAX_SIDE:
        raise DataError(f"{path}: {tuple(shape)} voxels; 1 to {MAX_SIDE} along each axis can be read")
    beside = [one for one in path.parent.glob(f"{glob.escape(path.stem)}*") if one.is_file()]
    if np.prod(shape, dtype=float) * dtype.itemsize > INFLATION * sum(map(os.path.getsize, beside)):
        raise DataError(f"{path}: damaged, too short for the {tuple(shape)} voxels its header claims")


def as_nifti(nibabel, voxels, affine):
    return nibabel.Nifti1Image(voxels, affine, dtype=voxels.dtype)
