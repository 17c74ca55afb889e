"""DICOM series, NRRD and MetaImage, written by SimpleITK, as slices."""

import itertools
import json

import numpy as np
import pytest
from handmade import SECRET, one_line_of, run, write_dicom, write_series
from PIL import Image

pytest.importorskip("SimpleITK")
pytest.importorskip("nibabel")
import SimpleITK as sitk

from ct import cases, scans
from ct.slices import DataError, read_slice
from ct.volumes import read_geometry, read_volume

RNG = np.random.default_rng(0)


def hu_volume(slices=6, size=(10, 8)):
    """(S, H, W) HU with air, tissue and bone, unlike in any direction."""
    hu = RNG.integers(-1000, 1200, (slices, *size)).astype(np.int16)
    hu[:, :2] = -1000
    hu[:, 2:5] = 40
    return hu


def places(values):
    return [f"-50\\-60\\{z}" for z in values]


def slice_them(capsys, tmp_path, images, *options):
    code, said, error = run(capsys, "slice", "--images", images, "--out", tmp_path / "set", *options)
    assert code == 0, error
    return tmp_path / "set", said


def stack(root, case):
    return np.stack([read_slice(path) for path in sorted((root / "images" / case).glob("*.png"))])


# ---- DICOM ---------------------------------------------------------------------------------------


def test_a_series_without_suffixes_becomes_slices_from_feet_to_head(tmp_path, capsys):
    hu = hu_volume()
    write_series(tmp_path / "in/patient7", hu, name="IM{:04d}")
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    assert "1 CT series: patient7 (6 slices)" in said
    assert (stack(root, "patient7") == hu).all()
    spacing = json.loads((root / "set.json").read_text())["spacing"]["patient7"]
    assert spacing == [2.0, 0.7, 0.7]  # of positions, not the thickness of 5 mm
    code, said, _ = run(capsys, "slice", "--images", tmp_path / "in", "--out", root)
    assert code == 0 and (stack(root, "patient7") == hu).all()


def test_labels_of_the_only_series_of_a_folder(tmp_path, capsys):
    """A NIfTI of another name that SimpleITK writes on the grid that it reads of the series."""
    hu, labels = hu_volume(9), RNG.integers(0, 3, (9, 10, 8)).astype(np.uint8)
    folder = write_series(tmp_path / "p1", hu)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = sitk.GetImageFromArray(labels)
    image.CopyInformation(reader.Execute())
    sitk.WriteImage(image, str(tmp_path / "drawn.nii.gz"))
    root, said = slice_them(capsys, tmp_path, folder, "--labels", tmp_path / "drawn.nii.gz")
    assert f"paired p1 with drawn.nii.gz, the only volume of {folder}" in said
    masks = [np.asarray(Image.open(path)) for path in sorted((root / "masks/p1").glob("*.png"))]
    assert (stack(root, "p1") == hu).all() and (np.stack(masks) == labels).all()


def test_files_in_any_order_and_the_rescaling_of_each(tmp_path):
    hu = hu_volume(5)
    folder = write_series(
        tmp_path / "case",
        hu,  # SimpleITK stores what gives these values by the slope and intercept
        name="{:d}.dcm",
        **{
            "0028|1052": ["-1024", "0", "-500", "-1024", "7"],
            "0028|1053": ["1"] * 5,
            "0020|0032": places([8, 2, 4, 6, 0]),
        },
    )
    volume = read_volume(folder / "0.dcm")
    order = np.argsort([8, 2, 4, 6, 0])
    assert (volume.array == hu[order]).all() and volume.spacing == (2.0, 0.7, 0.7)


def test_the_grid_is_that_of_simpleitk_itself(tmp_path):
    """Of a coronal series, turned a little: the mm of its corner voxels."""
    cosine, sine = np.cos(0.1), np.sin(0.1)
    row, column = (cosine, sine, 0), (0, 0, -1)
    normal = np.cross(row, column)
    position = ["\\".join(f"{v:.6f}" for v in np.array([10, -20, 300]) + 3 * i * normal) for i in range(4)]
    orientation = "\\".join(f"{v:.9f}" for v in (*row, *column))
    folder = write_series(
        tmp_path / "case", hu_volume(4), **{"0020|0032": position, "0020|0037": orientation}
    )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    corners = [*itertools.product(*((0, side - 1) for side in image.GetSize()))]
    theirs = np.array([image.TransformIndexToPhysicalPoint(corner) for corner in corners]) * [-1, -1, 1]
    own = read_geometry(folder / "IM0000").corners()
    assert sorted(np.round(own, 2).tolist()) == sorted(np.round(theirs, 2).tolist())


def test_several_series_in_one_folder_and_what_is_left_out(tmp_path, capsys):
    folder, first, second = tmp_path / "in/p1", hu_volume(), hu_volume(4)
    write_series(folder, first, "1.2.3", "a{:d}")
    write_series(folder, second, "1.2.4", "b{:d}")
    write_series(folder, hu_volume(2), "1.2.5", "c{:d}")
    write_series(folder, hu_volume(3), "1.2.6", "d{:d}", **{"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"})
    write_series(folder, hu_volume(3), "1.2.7", "e{:d}", **{"0008|0060": "PT"})
    write_series(folder, hu_volume(1), "1.2.8", "f{:d}", **{"0020|0037": None, "0020|0032": None})
    (folder / "report").write_bytes(bytes(128) + b"DICM" + b"nothing")
    (folder / "notes.txt").write_text("of the ward")
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    cases = sorted(path.name for path in (root / "images").iterdir() if path.is_dir())
    assert len(cases) == 2 and all(name.startswith("p1_") and len(name) == 11 for name in cases)
    assert sorted(len(stack(root, case)) for case in cases) == [4, 6]
    for text in (
        "3 files: in series of fewer",
        "3 files: localizers",
        "3 files: PT, not CT",
        "1 file: no picture",
    ):
        assert f"left out: {text}" in said


def test_one_series_with_two_orientations_is_two_volumes(tmp_path, capsys):
    turned = {"0020|0037": "1\\0\\0\\0\\0\\-1", "0020|0032": [f"-50\\{3 * i}\\0" for i in range(5)]}
    write_series(tmp_path / "in/p1", hu_volume(), name="a{:d}")
    write_series(tmp_path / "in/p1", hu_volume(5), name="b{:d}", **turned)
    _, said = slice_them(capsys, tmp_path, tmp_path / "in")
    assert "2 CT series" in said


@pytest.mark.parametrize("first", (-100.0, -99.999998, -99.0))
def test_two_acquisitions_of_one_range_are_two_cases(tmp_path, capsys, first):
    """At the same places, micrometres off, and half a slice off; numbers of slices run through both."""
    one, two = hu_volume(4), hu_volume(4)
    for offset, hu, number, start in ((0, one, "1", -100.0), (1, two, "2", first)):
        numbered = [str(2 * i + offset) for i in range(4)]
        told = {"0020|0012": number, "0020|0013": numbered}
        write_series(tmp_path / "in/p1", hu, name=f"{{:d}}{offset}", first=start, **told)
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    assert "2 CT series" in said and "WARNING" not in said
    cases = [path.name for path in (root / "images").iterdir() if path.is_dir()]
    assert {stack(root, case).tobytes() for case in cases} == {
        hu.astype(np.float32).tobytes() for hu in (one, two)
    }


@pytest.mark.parametrize("first", (-100.0, -99.999998))
def test_acquisitions_that_nothing_tells_apart_are_refused(tmp_path, capsys, first):
    write_series(tmp_path / "in/p1", hu_volume(4), name="x{:d}")
    write_series(tmp_path / "in/p1", hu_volume(4), name="y{:d}", first=first)
    code, _, error = run(capsys, "slice", "--images", tmp_path / "in", "--out", tmp_path / "other")
    assert code == 2 and one_line_of(error) and "acquisitions are mixed" in error and "dcm2niix" in error
    for number, path in enumerate((tmp_path / "in/p1").glob("x*")):  # copies, byte for byte or nearly
        content = path.read_bytes().replace(SECRET.encode(), b"DOE^JOHN" if number > 1 else SECRET.encode())
        path.with_name(path.name.replace("x", "y")).write_bytes(content)
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    assert len(stack(root, "p1")) == 4 and "4 files are copies of others" in said


def test_inverted_display_changes_no_value(tmp_path):
    """MONOCHROME1 says how values are shown; they are stored value x slope + intercept all the same."""
    hu = hu_volume(4)
    for name, intercept in (("a", "0"), ("b", "-1024")):
        folder = write_series(tmp_path / name, hu, **{"0028|1052": intercept, "0028|1053": "1"})
        for path in folder.iterdir():
            content = path.read_bytes()
            assert content.count(b"MONOCHROME2 ") == 1
            path.write_bytes(content.replace(b"MONOCHROME2 ", b"MONOCHROME1 "))
        assert (read_volume(folder / "IM0000").array == hu).all()


@pytest.mark.parametrize(
    "tags, stored",
    (
        ({"0028|0120": "63536"}, [63536]),
        ({"0028|0120": "-2000"}, [-2000]),
        ({"0028|0120": "63536"}, [-2000]),  # written without the sign that pixels have
        ({"0028|0120": "60000", "0028|0121": "60009"}, [60000, 60004, 60009]),
        ({"0028|0120": "60009", "0028|0121": "60000"}, [60000, 60004, 60009]),
        ({"0028|0120": "-3000", "0028|0121": "-2990"}, [-3000, -2995, -2990]),
    ),
)
@pytest.mark.parametrize("intercept", (-1024, -1000))
def test_what_tags_call_padding_is_air(tmp_path, capsys, tags, stored, intercept):
    hu = hu_volume(4)
    padded = hu.astype(np.int32)
    padded[:, 0, : len(stored)] = np.add(stored, intercept)
    as_stored = (padded - intercept).astype(np.uint16 if min(stored) > 0 else np.int16)
    folder = write_series(tmp_path / "in/p1", as_stored, **tags)
    for path in folder.iterdir():  # SimpleITK would store other values if it were told the intercept
        old, new = b"\x28\0\x52\x10\2\0\0\x000 ", b"\x28\0\x52\x10\6\0\0\0%-6d" % intercept
        assert path.read_bytes().count(old) == 1
        path.write_bytes(path.read_bytes().replace(old, new))
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    hu[:, 0, : len(stored)] = -1024
    assert (read_volume(folder / "IM0000").array == hu).all() and (stack(root, "p1") == hu).all()


def test_padding_of_values_that_are_no_hu_hides_nothing(tmp_path, capsys):
    """Unsigned without an intercept: air is 0 there, and the offset is asked for as without padding."""
    stored = (hu_volume(4) + 1024).astype(np.uint16)
    stored[:, 0] = 63536
    write_series(tmp_path / "in/p1", stored, **{"0028|0120": "63536"})
    code, _, error = run(capsys, "slice", "--images", tmp_path / "in", "--out", tmp_path / "set")
    assert code == 2 and one_line_of(error) and "1024" in error
    assert (read_volume(tmp_path / "in/p1/IM0000").array[:, 0] == 0).all()


@pytest.mark.parametrize("without", ("preamble", "preamble and mark", "first group"))
def test_files_without_the_mark_of_the_format(tmp_path, capsys, without):
    hu = hu_volume(4)
    for path in write_series(tmp_path / "in/p1", hu).iterdir():
        content = path.read_bytes()
        group = 132 + 12 + int.from_bytes(content[140:144], "little")
        path.write_bytes(
            content[{"preamble": 128, "preamble and mark": 132, "first group": group}[without] :]
        )
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    assert "1 CT series: p1 (4 slices)" in said and (stack(root, "p1") == hu).all()


def test_other_files_are_not_tried(tmp_path, monkeypatch):
    """However they begin: noise, texts, small numbers, volumes, pictures."""
    monkeypatch.setattr(scans, "import_simpleitk", lambda: pytest.fail("tried"))
    starts = [RNG.bytes(1024) for _ in range(300)] + [b"\x08\0" + RNG.bytes(1024) for _ in range(300)]
    starts += [b"\x08\0\x05\0" + RNG.bytes(1024) for _ in range(300)]
    starts += [
        np.array([8, 4, *range(200)], dtype).tobytes() for dtype in ("<i2", "<i4", "<i8", "<f4", ">i2")
    ]
    starts += [
        b"",
        b"\x08",
        b"\x08\0\x05\0CS",
        bytes(2000),
        b"\x89PNG\r\n\x1a\n",
        b"\x5c\x01\0\0" + bytes(400),
    ]
    for number, start in enumerate(starts):
        (tmp_path / str(number)).write_bytes(start)
    assert cases.volumes_below(tmp_path) == cases.Found([])


def test_gaps_and_uneven_places_are_said_and_large_gaps_refused(tmp_path, capsys):
    for number, (z, message) in enumerate(
        (
            ([0, 2, 4, 8, 10, 12], "slices are missing (usually 2 mm apart): between 4 and 8 mm"),
            ([0, 2, 4.2, 6, 8, 10], "unevenly spaced, 1.8 to 2.2 mm: 2 mm is taken"),
        )
    ):
        write_series(tmp_path / f"in{number}/p", hu_volume(), **{"0020|0032": places(z)})
        out = tmp_path / f"out{number}"
        code, said, _ = run(capsys, "slice", "--images", tmp_path / f"in{number}", "--out", out)
        assert code == 0 and message in said
    write_series(tmp_path / "far/p", hu_volume(), **{"0020|0032": places([0, 2, 4, 14, 16, 18])})
    code, _, error = run(capsys, "slice", "--images", tmp_path / "far", "--out", tmp_path / "out")
    assert (
        code == 2 and "10 mm between 4 and 14 mm: more than 3.5 times as much" in error and one_line_of(error)
    )


def test_the_largest_gap_is_named_first(tmp_path, capsys):
    heights = [*range(0, 40, 2), *(44 + 4 * i for i in range(6)), 80, 82]
    write_series(tmp_path / "in/p", hu_volume(28), **{"0020|0032": places(heights)})
    code, _, error = run(capsys, "slice", "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 2 and "16 mm between 64 and 80; 38 and 44; " in error and " ... mm: more than" in error


def test_an_acquisition_for_each_slice_is_one_volume(tmp_path, capsys):
    """Also where a place occurs twice; as acquisitions they would all be too short."""
    numbered = {"0020|0012": [str(i) for i in range(6)], "0020|0032": places([0, 2, 4, 6, 8, 8])}
    hu = hu_volume()
    write_series(tmp_path / "in/p1", hu, **numbered)
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    assert "1 CT series: p1 (5 slices)" in said and "1 files lie where others do" in said
    assert (stack(root, "p1") == hu[:5]).all()


def test_pixels_of_two_sizes_are_two_volumes(tmp_path, capsys):
    write_series(tmp_path / "in/p1", hu_volume(3), name="a{:d}")
    write_series(tmp_path / "in/p1", hu_volume(3), name="b{:d}", spacing=0.9)
    root, _ = slice_them(capsys, tmp_path, tmp_path / "in")
    spacing = json.loads((root / "set.json").read_text())["spacing"]
    assert sorted(spacing.values()) == [[2.0, 0.7, 0.7], [2.0, 0.9, 0.9]]


def test_values_that_are_not_whole_stay_so(tmp_path):
    """Also in one slice of a series only; padding is known by what is stored."""
    hu = hu_volume(4)
    folder = single_slices(tmp_path / "case", hu)
    stored = hu[2].copy()
    stored[0, :3] = -2000, -2001, 1999
    halves = {"0028|1052": ("DS", "0.25"), "0028|1053": ("DS", "0.5"), "0028|0120": ("SS", -2000)}
    single_slices(tmp_path / "other", stored[None], **halves, **{"0020|0032": ("DS", "-50\\-60\\4")})
    (tmp_path / "other/0").rename(folder / "2")
    expected = hu.astype(np.float32)
    expected[2] = stored * 0.5 + 0.25
    expected[2, 0, 0] = -1024
    assert (read_volume(folder / "0").array == expected).all()


@pytest.mark.parametrize(
    "text, number", (("7", 7), ("-3", -3), ("+-5", 0), ("²", 0), ("9" * 5000, 0), ("", 0), ("1.5", 0))
)
def test_numbers_of_slices(text, number):
    assert scans.whole(text, 0) == number


def test_a_tilted_gantry_is_said_and_stays_in_the_grid(tmp_path, capsys):
    z = np.arange(6) * 2.0
    tilted = [f"-50\\{-60 + 0.5 * one}\\{one}" for one in z]  # atan(0.5) = 26.6 degrees
    write_series(tmp_path / "in/p", hu_volume(), **{"0020|0032": tilted})
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    assert "tilted by 26.6 degrees" in said
    geometry = read_geometry(tmp_path / "in/p/IM0000")
    last = geometry.positions((5, 0, 0))
    assert last == pytest.approx([50, 60 - 5, 10])  # towards right and front


def test_nobodys_name_goes_anywhere(tmp_path, capsys):
    write_series(tmp_path / "in/p1", hu_volume())
    write_series(tmp_path / "in/p1", hu_volume(4), "1.2.9.77", "b{:d}")
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    code, checked, error = run(capsys, "check", "--root", root)
    written = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    for word in (SECRET, "DOE", "1.2.9.77"):
        assert word.encode() not in written and word not in said + checked + error


def test_series_of_one_patient_are_known_by_a_hash_of_the_id(tmp_path):
    identity = "MRN-4711"
    for folder, given in (("a", identity), ("b", identity + " "), ("c", "MRN-4712"), ("d", None)):
        write_series(tmp_path / folder, hu_volume(3), f"1.2.{folder}", **{"0010|0020": given})
    found, _ = scans.find_series(scans.dicom_files(tmp_path))
    first, again, other, unknown = (one.patient for one in found)
    assert first == again != other and len(first) == len(other) == 8 and unknown == ""
    assert identity not in repr(found) and identity not in repr(scans.read_header(found[0].path))


def pictures(stored, uid="1.2.3", kind="1.2.840.10008.5.1.4.1.1.2"):
    """Elements of a CT of stored values (H, W), or (S, H, W) in many frames."""
    return {
        "0008|0016": ("UI", kind),
        "0008|0018": ("UI", uid),
        "0008|0060": ("CS", "CT"),
        "0020|000e": ("UI", "1.2.4"),
        "0028|0002": ("US", 1),
        "0028|0004": ("CS", "MONOCHROME2"),
        "0028|0010": ("US", stored.shape[-2]),
        "0028|0011": ("US", stored.shape[-1]),
        "0028|0100": ("US", 16),
        "0028|0101": ("US", 16),
        "0028|0102": ("US", 15),
        "0028|0103": ("US", int(stored.dtype == np.int16)),
        "7fe0|0010": ("OW", stored.tobytes()),
    }


def single_slices(folder, stored, **changed):
    """A file a slice of stored values (S, H, W). changed: {tag: (kind, value)}, None to leave it out."""
    for number, one in enumerate(stored):
        elements = pictures(one, f"1.2.3.{number}") | {
            "0020|0032": ("DS", f"-50\\-60\\{2 * number}"),
            "0020|0037": ("DS", "1\\0\\0\\0\\1\\0"),
            "0028|0030": ("DS", "0.7\\0.7"),
            "0028|1052": ("DS", "0"),
            "0028|1053": ("DS", "1"),
        }
        elements = {tag: value for tag, value in (elements | changed).items() if value}
        write_dicom(folder / f"{number}", elements)
    return folder


def enhanced(path, hu, z, uid="1.2.3", implicit=False, intercepts=None, **changed):
    """A CT of many frames in one file: frames (S, H, W) at the heights z, in mm. intercepts: of each frame,
    in place of one for all; changed: {tag: (kind, value)}."""

    def scale(intercept):
        return {"0028|9145": ("SQ", [{"0028|1052": ("DS", f"{intercept}"), "0028|1053": ("DS", "1")}])}

    shared = {
        "0028|9110": ("SQ", [{"0028|0030": ("DS", "0.7\\0.7"), "0018|0050": ("DS", "5")}]),
        "0020|9116": ("SQ", [{"0020|0037": ("DS", "1\\0\\0\\0\\1\\0")}]),
    }
    places = [{"0020|9113": ("SQ", [{"0020|0032": ("DS", f"-50\\-60\\{one}")}])} for one in z]
    stored = (hu + 1024).astype("<u2")
    elements = pictures(stored, uid, "1.2.840.10008.5.1.4.1.1.2.1") | {
        "0028|0008": ("IS", f"{len(hu)}"),
        "5200|9229": ("SQ", [shared if intercepts else shared | scale(-1024)]),
        "5200|9230": (
            "SQ",
            [one | scale(own) for one, own in zip(places, intercepts)] if intercepts else places,
        ),
    }
    write_dicom(path, elements | changed, implicit)


@pytest.mark.parametrize("implicit", (False, True))
def test_a_file_of_many_frames(tmp_path, implicit):
    hu = hu_volume(5)
    for z, expected in (([0, 2, 4, 6, 8], hu), ([8, 6, 4, 2, 0], hu[::-1]), ([0, 1, 2, 3, 4], hu)):
        enhanced(tmp_path / "ct", hu, z, implicit=implicit)
        volume = read_volume(tmp_path / "ct")
        assert (volume.array == expected).all()
        assert volume.spacing == pytest.approx((abs(z[1] - z[0]), 0.7, 0.7))


@pytest.mark.parametrize(
    "z", ([0, 4, 2, 8, 6], [0, 2, 4, 8, 10], [0, 0, 2, 2, 4], [0, 2, 4, 0, 2], [0, 0, 0, 0, 0])
)
def test_frames_in_no_order_twice_or_with_gaps_are_refused(tmp_path, z):
    enhanced(tmp_path / "ct", hu_volume(5), z)
    with pytest.raises(DataError, match="many frames that are not in the order of evenly spaced places"):
        read_volume(tmp_path / "ct")


def test_frames_that_are_rescaled_differently_are_refused(tmp_path):
    """SimpleITK would take what the first frame says for all of them."""
    hu = hu_volume(5)
    enhanced(tmp_path / "ct", hu, [0, 2, 4, 6, 8], intercepts=[-1024] * 5)
    assert (read_volume(tmp_path / "ct").array == hu).all()
    enhanced(tmp_path / "ct", hu_volume(5), [0, 2, 4, 6, 8], intercepts=[-1024, -1024, 0, 0, 0])
    with pytest.raises(DataError, match="many frames that are rescaled differently"):
        read_volume(tmp_path / "ct")


def test_padding_and_inverted_display_of_many_frames(tmp_path):
    hu = hu_volume(5)
    hu[1:3, 0, :4] = 32000  # stored as 33024
    tags = {"0028|0120": ("US", 33024), "0028|0004": ("CS", "MONOCHROME1")}
    enhanced(tmp_path / "ct", hu, [0, 2, 4, 6, 8], **tags)
    hu[1:3, 0, :4] = -1024
    assert (read_volume(tmp_path / "ct").array == hu).all()


def test_two_files_of_many_frames_of_one_series_are_two_cases(tmp_path, capsys):
    first, second = hu_volume(5), hu_volume(5)
    (tmp_path / "in/p1").mkdir(parents=True)
    enhanced(tmp_path / "in/p1/a", first, [0, 2, 4, 6, 8], "1.2.3.1")
    enhanced(tmp_path / "in/p1/b", second, [0, 2, 4, 6, 8], "1.2.3.2")
    root, said = slice_them(capsys, tmp_path, tmp_path / "in")
    cases = sorted(path.name for path in (root / "images").iterdir() if path.is_dir())
    assert "2 CT series" in said and len(cases) == 2
    assert {stack(root, case).sum() for case in cases} == {first.sum(), second.sum()}


def test_each_header_is_read_once(tmp_path, capsys, monkeypatch):
    """However many series a folder holds, and again where a file has changed."""
    for number in range(4):
        write_series(tmp_path / "in/p1", hu_volume(3), f"1.2.{number}", f"{number}-{{:d}}")
    read, real = [], scans.reading
    monkeypatch.setattr(scans, "reading", lambda path: read.append(path) or real(path))
    files = scans.dicom_files(tmp_path / "in")
    assert [scans.series_of(file).slices[0].path.name[0] for file in files] == [*"000111222333"]
    assert sorted(read) == sorted(files)
    write_series(tmp_path / "in/p1", hu_volume(3), "1.2.300", "0-{:d}")
    assert scans.series_of(files[0]).path == files[0] and len(read) == len(files) + 3


def test_slices_that_do_not_say_how_far_apart_their_pixels_are(tmp_path, capsys):
    write_series(tmp_path / "in/p1", hu_volume())
    single_slices(tmp_path / "in/p2", hu_volume(), **{"0028|0030": None})
    _, said = slice_them(capsys, tmp_path, tmp_path / "in")
    assert "1 CT series: p1" in said and "6 files: without the distance of their pixels" in said


def test_what_is_no_series_is_one_line(tmp_path, capsys):
    write_series(tmp_path / "in", hu_volume(2))
    code, _, error = run(capsys, "slice", "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert (
        code == 2
        and "no volumes there" in error
        and "2 files: in series of fewer than 3" in error
        and one_line_of(error)
    )
    code, _, error = run(capsys, "slice", "--images", tmp_path / "in/IM0000", "--out", tmp_path / "out")
    assert code == 2 and "not a slice of a CT series" in error and one_line_of(error)
    assert not (tmp_path / "out").exists()


def test_simpleitk_is_asked_for_by_name(tmp_path, capsys, monkeypatch):
    import sys

    write_series(tmp_path / "in/p", hu_volume())
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    code, _, error = run(capsys, "slice", "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 2 and "pip install SimpleITK" in error and one_line_of(error)


# ---- NRRD and MetaImage --------------------------------------------------------------------------


def itk_image(hu, spacing=(0.7, 0.8, 2.5), origin=(-50, -60, -100), direction=None):
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(np.ravel(direction).tolist())
    return image


@pytest.mark.parametrize(
    "suffix, packed", ((".nrrd", True), (".mha", False), (".mhd", True), (".NRRD", False))
)
def test_images_and_labels_in_other_formats(tmp_path, capsys, suffix, packed):
    """The same slices as from NIfTI files, which SimpleITK writes of the same images."""
    turned = np.array([[0, -1, 0], [-1, 0, 0], [0, 0, -1.0]])
    hu, labels = hu_volume(12), RNG.integers(0, 3, (12, 10, 8)).astype(np.uint8)
    for folder, ending in (("x", suffix), ("nifti", ".nii.gz")):
        for part, array in (("images", hu), ("labels", labels)):
            place = tmp_path / folder / part
            place.mkdir(parents=True)
            written = place / f"case1{ending.lower()}"
            sitk.WriteImage(itk_image(array, direction=turned), str(written), packed)
            written.rename(place / f"case1{ending}")
        options = ["--images", tmp_path / folder / "images", "--labels", tmp_path / folder / "labels"]
        code, _, error = run(capsys, "slice", *options, "--out", tmp_path / folder / "set")
        assert code == 0, error
    sets = [tmp_path / folder / "set" for folder in ("x", "nifti")]
    files = sorted(path.relative_to(sets[0]) for path in sets[0].rglob("*.png"))
    assert len(files) == 24
    for name in files:
        assert (np.asarray(Image.open(sets[0] / name)) == np.asarray(Image.open(sets[1] / name))).all()
    about = [json.loads((root / "set.json").read_text()) for root in sets]
    assert about[0]["spacing"]["case1"] == pytest.approx(about[1]["spacing"]["case1"], rel=1e-5)


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda hu: sitk.GetImageFromArray(hu[0]), "three dimensions"),
        (lambda hu: sitk.GetImageFromArray(hu, isVector=True), "three dimensions"),
        (lambda hu: sitk.GetImageFromArray(hu.astype(complex)), "three dimensions"),
    ),
)
def test_what_is_no_volume_of_numbers(tmp_path, make, message):
    sitk.WriteImage(make(hu_volume()), str(tmp_path / "a.mha"))
    with pytest.raises(DataError, match=message):
        read_volume(tmp_path / "a.mha")


def test_damaged_headers_are_one_line(tmp_path):
    path = tmp_path / "a.mhd"
    sitk.WriteImage(itk_image(hu_volume()), str(path))
    text = path.read_text()
    for old, new, message in (
        ("8 10 6", "8 10 60000", "1 to|too short"),
        ("8 10 6", "8000 8000 8000", "too short"),
        ("a.raw", "../a.raw", "no file beside it"),
        ("a.raw", "b.raw", "no file beside it"),
        ("MET_SHORT", "MET_NOTHING", "not a readable volume|three dimensions"),
        ("0.69999999999999996", "0", "affine|mm|readable"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(DataError, match=message) as raised:
            read_volume(path)
        assert "\n" not in str(raised.value)
    path.write_text(text)
    (tmp_path / "a.raw").write_bytes(b"short")
    with pytest.raises(DataError):
        read_volume(path)


def test_bzip2_is_named(tmp_path):
    sitk.WriteImage(itk_image(hu_volume()), str(tmp_path / "a.nrrd"))
    content = (tmp_path / "a.nrrd").read_bytes()
    assert b"encoding: raw" in content
    (tmp_path / "a.nrrd").write_bytes(content.replace(b"encoding: raw", b"encoding: bzip2"))
    with pytest.raises(DataError, match="packed by bzip2"):
        read_volume(tmp_path / "a.nrrd")


def test_voxels_are_read_only_when_they_are_wanted(tmp_path, monkeypatch):
    sitk.WriteImage(itk_image(hu_volume()), str(tmp_path / "a.nrrd"))
    monkeypatch.setattr(scans.Voxels, "__array__", lambda *_: pytest.fail("read"))
    assert read_geometry(tmp_path / "a.nrrd").spacing() == pytest.approx([2.5, 0.8, 0.7])
