"""DICOM series, NRRD and MetaImage as nibabel's images, so that everything else knows one kind of volume.

dicom_files, find_series    the CT series below a folder, one Series each; in words what was left out
series_in                   the same as names of cases
open_scan                   header and grid of a file or a series; voxels are read when they are asked for

SimpleITK is needed here and nowhere else (pip install SimpleITK); it also reads compressed DICOM. Of a DICOM
header only what says where pixels lie is looked at, and the patient's ID, of which a hash is kept: names and
dates of patients go nowhere.
"""

import glob
import hashlib
import mmap
import os
import re
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from ct.listing import SCANS, VOLUMES, files_below
from ct.plausible import Doubt
from ct.slices import MAX_SIDE, SUFFIXES, DataError
from engine.config import one_line

FEWEST = 3  # slices; less is a localizer or a single picture
LARGEST_GAP = 3.5  # times the usual distance of slices; two of them may be missing in a row
UNEVEN = 0.02  # of the usual distance; what positions may be off without a word
SAME_PLACE = 0.01  # mm
TILT = 0.5  # degrees between the way the slices go and the normal of their plane, worth a word
INFLATION = 1032  # the most that deflate can do
REMEMBERED = 100_000  # headers, of about 1 kB each
TO_RAS = np.diag([-1.0, -1, 1, 1])  # DICOM and ITK count towards the patient's left and back
TAGS = {
    "series": "0020|000e",
    "modality": "0008|0060",
    "kind": "0008|0008",
    "patient": "0010|0020",
    "acquisition": "0020|0012",
    "number": "0020|0013",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "spacing": "0028|0030",
    "frames": "0028|0008",
    "intercept": "0028|1052",
    "slope": "0028|1053",
}


@dataclass(frozen=True)
class Slice:
    """One DICOM file: how it is turned, (2, 3), row and column in mm as files count them, and its place."""

    path: Path
    size: tuple  # (columns, rows)
    spacing: tuple  # mm between columns, between rows
    turned: tuple  # (6,) cosines of a row and of a column
    position: tuple  # mm of the first pixel
    number: int

    def along(self):
        """mm along the normal of its plane."""
        return float(np.dot(np.cross(self.turned[:3], self.turned[3:]), self.position))

    def order(self):
        return self.along(), self.number, str(self.path)


@dataclass(frozen=True)
class Series:
    """Files of one volume in the order of their places. uid: of a series and its part, hashed; patient: their
    ID, hashed, "" if the files name none."""

    folder: Path
    uid: str
    patient: str
    slices: tuple
    doubts: tuple = ()
    failure: str | None = None  # why it cannot be taken

    @property
    def path(self):
        """The file that stands for all of them."""
        return self.slices[0].path


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


def is_dicom(path):
    """By the mark of the format, 128 bytes from the start."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(files):
    """The CT series among DICOM files, as [Series], and [what was left out and why]. A series is what has one
    folder, UID, size and orientation; of places that occur several times by one acquisition each, or else the
    first."""
    groups, left_out, found = defaultdict(list), Counter(), []
    for path in files:
        header = read_header(path)
        if reason := not_a_slice(header):
            left_out[reason] += 1
        else:
            groups[path.parent, header["series"]].append((path, header))
    for members in groups.values():
        for part in volumes_of(members):
            series = ordered(part)
            if max(len(series.slices), part[0][1]["frames"]) < FEWEST:
                left_out[f"in series of fewer than {FEWEST} places"] += len(part)
            else:
                found.append(series)
    return found, [
        f"{count} {'file' if count == 1 else 'files'}: {reason}" for reason, count in left_out.items()
    ]


def case_names(series, root):
    """What cases are called: by their folder below the root, and by a hash of the UID where a folder holds
    several."""
    several = Counter(one.folder for one in series)
    names = []
    for one in series:
        inside = one.folder.resolve().is_relative_to(root.resolve())
        parts = one.folder.resolve().relative_to(root.resolve()).parts if inside else ()
        name = "_".join(parts) or one.folder.resolve().name
        names.append(f"{name}_{one.uid}" if several[one.folder] > 1 else name)
    return names


def series_in(source):
    """{the file that stands for a CT series: what its case is called} of all series below a folder, or of the
    one that a file belongs to; and [what was left out and why]. Files that are called slices or volumes of
    other formats are not opened. Raises DataError for a file of no series that can be read."""
    if source.is_file():
        return {source: series_of(source).folder.resolve().name} if is_dicom(source) else {}, []
    others = [name for name in files_below(source, "") if not name.lower().endswith((*SUFFIXES, *VOLUMES))]
    series, left_out = find_series(filter(is_dicom, (source / name for name in others)))
    return dict(zip([one.path for one in series], case_names(series, source))), left_out


def read_header(path):
    """{name in TAGS: text, "size": (columns, rows)} of a DICOM file; {} if it holds no picture."""
    about = os.stat(path)
    return header_as_of(path, about.st_size, about.st_mtime_ns)


@lru_cache(REMEMBERED)  # each series of a folder asks for the headers of all files there
def header_as_of(path, size, mtime_ns):
    sitk = import_simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        with reading(path):
            reader.ReadImageInformation()
            keys = {*reader.GetMetaDataKeys()}
            header = {name: reader.GetMetaData(tag).strip() for name, tag in TAGS.items() if tag in keys}
    except DataError:  # a report, a presentation state, or damaged
        return {}
    size, spacing, grey = reader.GetSize(), reader.GetSpacing(), reader.GetNumberOfComponents() == 1
    header = dict.fromkeys(TAGS, "") | header | {"size": size[:2], "grey": grey}
    header["patient"] = header["patient"] and hashed(header["patient"])
    header["frames"] = whole(header["frames"], 1)
    if header["frames"] > 1:
        header["frames apart"] = are_evenly_apart(
            of_frames(path, "position"), header["frames"], abs(spacing[-1])
        )
        header["frames alike"] = all(len({*of_frames(path, name)}) < 2 for name in ("slope", "intercept"))
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
        return "of many frames that are not in the order of evenly spaced places"
    if header["frames"] > 1 and not header["frames alike"]:
        return "of many frames that are rescaled differently"
    return None


def numbers(text, count):
    """count finite numbers, written 1\\2\\3; None for anything else."""
    try:
        values = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def whole(text, otherwise):
    """A whole number of the 12 digits that DICOM allows; something else for any other text."""
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,12}", text) else otherwise


def volumes_of(members):
    """The files of one series, [(path, header)], apart by size, orientation and size of pixels, and by
    acquisition where that leaves whole series, in which no place occurs twice."""
    parts = defaultdict(list)
    for path, header in members:
        turned, spacing = numbers(header["orientation"], 6) or (), numbers(header["spacing"], 2) or ()
        alone = path if header["frames"] > 1 else None
        grid = header["size"], tuple(np.round(turned, 3)), tuple(np.round(spacing, 4))
        parts[grid, alone].append((path, header))
    for part in parts.values():
        acquisitions = defaultdict(list)
        for path, header in part:
            acquisitions[header["acquisition"]].append((path, header))
        split = [*acquisitions.values()]
        apart = all(len(one) >= FEWEST and not has_repeated_places(one) for one in split)
        if apart and has_repeated_places(part):
            yield from split
        else:
            yield part


def has_repeated_places(part):
    places = [numbers(header["position"], 3) for _, header in part]
    return len({*places}) < len(places)


# ---- The places of a series ----------------------------------------------------------------------


def ordered(part):
    """The Series of some files, sorted by place; doubts: places that occur twice, gaps, tilt."""
    path, header = part[0]
    content = [header[name] for name in ("series", "orientation", "acquisition", "size", "spacing")]
    if header["frames"] > 1:  # a volume of its own
        alone = Slice(path, header["size"], (), (), (), 0)
        return Series(path.parent, hashed(*content, path.name), header["patient"], (alone,))
    folder, uid, patient = path.parent, hashed(*content), header["patient"]
    slices = sorted((slice_of(path, header) for path, header in part), key=Slice.order)
    kept = slices[:1] + [b for a, b in pairwise(slices) if b.along() - a.along() > SAME_PLACE]
    if len(kept) < FEWEST:
        return Series(folder, uid, patient, tuple(kept))
    odd, failure = odd_places(kept)
    if repeated := len(slices) - len(kept):
        odd.insert(0, f"{repeated} files lie where others do: of each place the first is taken")
    which = f"{folder}: series {uid}"
    doubts = tuple(Doubt(f"{which}: {text}") for text in odd)
    return Series(folder, uid, patient, tuple(kept), doubts, failure and f"{which}: {failure}")


def hashed(*content):
    return hashlib.sha256("".join(map(str, content)).encode()).hexdigest()[:8]


def slice_of(path, header):
    number, spacing = whole(header["number"], 0), numbers(header["spacing"], 2)[::-1]
    turned, position = numbers(header["orientation"], 6), numbers(header["position"], 3)
    return Slice(path, header["size"], spacing, turned, position, number)


def odd_places(slices):
    """What is odd about the places of sorted slices, in words; and why they cannot be taken, or None."""
    along = np.array([one.along() for one in slices])
    apart, odd = np.diff(along), []
    usual = float(np.median(apart))
    gaps = sorted((i for i in range(len(apart)) if apart[i] > 1.5 * usual), key=lambda i: -apart[i])
    shown = "; ".join(f"{along[i]:.5g} and {along[i + 1]:.5g}" for i in gaps[:5])
    shown += " ..." if len(gaps) > 5 else ""
    if gaps and apart.max() > LARGEST_GAP * usual:
        text = f"slices are {usual:.4g} mm apart, but up to {apart.max():.4g} mm between {shown} mm"
        return [], f"{text}: more than {LARGEST_GAP:g} times as much; are files missing?"
    if gaps:
        odd.append(f"slices are missing (usually {usual:.4g} mm apart): between {shown} mm")
    elif np.abs(apart - usual).max() > UNEVEN * usual:
        span = f"{apart.min():.4g} to {apart.max():.4g} mm"
        odd.append(f"slices are unevenly spaced, {span}: {usual:.4g} mm is taken")
    way = np.subtract(slices[-1].position, slices[0].position)
    cosine = (along[-1] - along[0]) / max(np.linalg.norm(way), 1e-9)
    if (degrees := np.degrees(np.arccos(np.clip(cosine, -1, 1)))) > TILT:
        odd.append(f"the gantry was tilted by {degrees:.1f} degrees: each slice is taken as it lies")
    return odd, None


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
        return open_file(nibabel, path, None), []
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
    sitk, first, last = import_simpleitk(), series.slices[0], series.slices[-1]
    count = len(series.slices)
    affine = np.eye(4)
    affine[:3, 0] = np.multiply(first.turned[:3], first.spacing[0])
    affine[:3, 1] = np.multiply(first.turned[3:], first.spacing[1])
    way = np.subtract(last.position, first.position)
    steps = np.diff([one.along() for one in series.slices])
    affine[:3, 2] = way / np.sum(steps) * np.median(steps)
    affine[:3, 3] = first.position

    def read():
        voxels = np.empty((*first.size, count), np.int16, order="F")  # slice after slice
        for index, one in enumerate(series.slices):
            pixels = read_pixels(sitk, one.path, first.size)
            if voxels.dtype == np.int16 and not fits_int16(pixels):
                voxels = voxels.astype(np.float32)
            voxels[:, :, index] = pixels
        return voxels

    return as_nifti(nibabel, Voxels((*first.size, count), np.float32, read), TO_RAS @ affine)


def read_pixels(sitk, path, size):
    """(columns, rows) of one file, its rescale slope and intercept applied."""
    with reading(path):
        pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
    if pixels.shape != (1, *size[::-1]):
        raise DataError(f"{path}: {pixels.shape} pixels for the {size} of its header")
    return pixels[0].T


def fits_int16(pixels):
    limits = np.iinfo(np.int16)
    return limits.min <= pixels.min() and pixels.max() <= limits.max and (np.rint(pixels) == pixels).all()


def open_file(nibabel, path, io):
    """One file of a volume, as SimpleITK's `io` reads it; None: by its name."""
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
