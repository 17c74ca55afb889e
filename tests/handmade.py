"""Input that tests write by hand, not with the code under test, and data.py in this process."""

import json
import locale
import struct
import zlib
from pathlib import Path

import numpy as np

from prepare import commands

ROOT = Path(__file__).parent.parent  # of the project


def png_bytes(array, color=0, depth=None, palette=None, claim=None):
    """A PNG of (H, W) or (H, W, 3) from struct and zlib alone; `claim`: the (width, height) its header
    states."""
    array = np.asarray(array)
    depth = depth or 8 * array.dtype.itemsize
    rows = array.astype(array.dtype.newbyteorder(">"))
    raw = b"".join(b"\x00" + row.tobytes() for row in rows)
    width, height = claim or (array.shape[1], array.shape[0])

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    colors = chunk(b"PLTE", bytes(palette)) if palette is not None else b""
    return b"\x89PNG\r\n\x1a\n" + header + colors + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else png_bytes(content))
    return path


def random_set(root, cases=("a", "b", "c"), slices=3, shape=(12, 10), classes=4, seed=0):
    """images/CASE/N.png (16 bit), masks and train.txt, written by hand."""
    rng = np.random.default_rng(seed)
    names = [f"{case}/{index:02d}.png" for case in cases for index in range(slices)]
    for name in names:
        put(root / "images" / name, rng.integers(0, 3000, shape).astype(np.uint16))
        put(root / "masks" / name, rng.integers(0, classes, shape).astype(np.uint8))
    (root / "train.txt").write_text("\n".join(names) + "\n")
    return names


def save_volume(nibabel, path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([0.8, 0.9, 2.5, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def nnunet_folder(nibabel, root, labels, cases=5):
    """A raw data set of nnU-Net, two channels a case, with ids 0 to 3 in its labels."""
    for number in range(1, cases + 1):
        voxels = np.random.default_rng(number).integers(0, 4, (6, 5, 4)).astype(np.int16)
        for channel in ("_0000", "_0001"):
            save_volume(nibabel, root / f"imagesTr/ct_{number:03d}{channel}.nii.gz", voxels * 100)
        save_volume(nibabel, root / f"labelsTr/ct_{number:03d}.nii.gz", voxels)
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "channel_names": {"0": "CT"}}))
    return ("slice", "--images", root / "imagesTr", "--labels", root / "labelsTr", "--out", root / "out")


def run(capsys, *argv):
    """data.py with these arguments, in this process: exit code, output, errors."""
    try:
        code = commands.main([str(word) for word in argv])
    except SystemExit as exit:
        code = exit.code
    output = capsys.readouterr()
    return code, output.out, output.err


def one_line_of(error):
    return error.count("\n") == 1 and "Traceback" not in error


def affines(nibabel):
    """Flipped, permuted and oblique ones: (name, affine)."""
    from nibabel.eulerangles import euler2mat

    zooms = np.diag([0.7, 0.8, 5.0])
    for codes in ("RAS", "LPS", "LAS", "SRP", "AIL", "PSR"):
        orientation = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(codes), (1, 1, 1))
        affine = np.eye(4)
        affine[:3, :3] = np.linalg.inv(orientation[:3, :3]) @ zooms
        affine[:3, 3] = (-30, 12, 700)
        yield codes, affine
    oblique = np.eye(4)
    oblique[:3, :3] = euler2mat(0.2, -0.15, 0.1) @ np.diag([-1, 1, -1]) @ zooms
    yield "oblique", oblique


# ---- DICOM ---------------------------------------------------------------------------------------

SECRET = "DOE^JANE"  # the patient's name


def write_series(folder, hu, uid="1.2.3", name="IM{:04d}", spacing=0.7, mm=2.0, first=-100.0, **changed):
    """One file a slice of hu (S, H, W), from the feet up. changed: {tag: text, or text of each slice}."""
    import SimpleITK as sitk

    kept = locale.setlocale(locale.LC_ALL)  # its writer leaves another one, and with it another encoding
    folder.mkdir(parents=True, exist_ok=True)
    for index, one in enumerate(hu):
        image = sitk.GetImageFromArray(one[None])
        tags = {
            "0008|0060": "CT",
            "0010|0010": SECRET,
            "0020|000e": uid,
            "0008|0018": f"{uid}.{index}",
            "0020|0013": str(index + 1),
            "0020|0032": f"-50\\-60\\{first + mm * index}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|0030": f"{spacing}\\{spacing}",
            "0018|0050": "5",
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
        }
        tags |= {tag: text[index] if isinstance(text, list) else text for tag, text in changed.items()}
        image.SetSpacing([spacing, spacing, 1])
        for tag, text in tags.items():
            if text is not None:
                image.SetMetaData(tag, text)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(folder / "part.dcm"))
        writer.Execute(image)
        (folder / "part.dcm").rename(folder / name.format(index))
    locale.setlocale(locale.LC_ALL, kept)
    return folder


def write_dicom(path, elements, implicit=False):
    """One DICOM file by struct alone. elements: {tag: (kind, value)}; a value is a text, a whole number,
    bytes, or a list of such dicts for a sequence (SQ). implicit: kinds are not written."""
    syntax = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1"
    about = {"0002|0002": ("UI", "1.2.840.10008.5.1.4.1.1.2.1"), "0002|0003": ("UI", "1.2.3")}
    about = dicom_bytes(about | {"0002|0010": ("UI", syntax)}, False)
    about = dicom_bytes({"0002|0000": ("UL", len(about))}, False) + about
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + about + dicom_bytes(elements, implicit))


def dicom_bytes(elements, implicit):
    written = b""
    for tag, (kind, value) in sorted(elements.items()):
        if kind == "SQ":
            items = [dicom_bytes(item, implicit) for item in value]
            value = b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(item)) + item for item in items)
        elif kind in ("US", "SS", "UL"):
            value = struct.pack({"US": "<H", "SS": "<h", "UL": "<I"}[kind], value)
        elif isinstance(value, str):
            value = value.encode() + (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
        written += struct.pack("<HH", *(int(half, 16) for half in tag.split("|")))
        if implicit:
            written += struct.pack("<I", len(value))
        else:
            long = kind in ("SQ", "OW")
            written += kind.encode() + struct.pack("<HI" if long else "<H", *([0] * long), len(value))
        written += value
    return written
