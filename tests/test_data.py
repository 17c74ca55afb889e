"""Readers on files that other writers made, lists, datasets, packed sets, and the commands of data.py."""

import json
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ct import layout, organs, volumes
from ct.layout import case_of, find_slices, read_list
from ct.organs import class_colors
from ct.slices import DataError, read_mask, read_slice
from data import Intensity, SegmentationDataset, SliceDataset
from prepare import commands
from prepare.lists import split_cases
from prepare.phantom import phantom_case, phantom_spacing

CT = Path(__file__).parents[2] / "shared" / "ct"
needs_ct = pytest.mark.skipif(not CT.is_dir(), reason=f"needs the real CT in {CT}")


# ---- Files written by hand -----------------------------------------------------------------------


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


# ---- Readers -------------------------------------------------------------------------------------


def test_read_slice_16_bit_8_bit_and_npy(tmp_path):
    values = np.array([[0, 1024, 1064], [3000, 40000, 65535]], np.uint16)
    hu = read_slice(put(tmp_path / "a.png", values))
    assert hu.dtype == np.float32 and np.array_equal(hu, values.astype(int) - 1024)
    assert np.array_equal(read_slice(tmp_path / "a.png", hu_offset=0), values)
    gray = np.array([[0, 128, 255]], np.uint8)
    assert np.array_equal(read_slice(put(tmp_path / "b.png", gray)), gray)
    np.save(tmp_path / "c.npy", np.array([[-1000, 40], [3000, -5]], np.int16))
    assert np.array_equal(read_slice(tmp_path / "c.npy"), [[-1000, 40], [3000, -5]])


def test_read_mask_gray_and_palette(tmp_path):
    labels = np.array([[0, 1, 255], [13, 2, 0]], np.uint8)
    assert np.array_equal(read_mask(put(tmp_path / "a.png", labels)), labels)
    indexed = put(tmp_path / "b.png", png_bytes(labels, color=3, palette=(np.arange(768) % 251).tolist()))
    assert np.array_equal(read_mask(indexed), labels)
    packed = np.array([[0x01], [0x23]], np.uint8)  # 4 bits a pixel: the indices 0 1 and 2 3
    four_bits = put(tmp_path / "c.png", png_bytes(packed, 3, depth=4, palette=range(48), claim=(2, 2)))
    assert np.array_equal(read_mask(four_bits), [[0, 1], [2, 3]])


def bad_slices():
    gray = np.zeros((5, 5), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60)).astype(np.uint8)
    return {
        "colour.png": (png_bytes(np.zeros((5, 5, 3), np.uint8), color=2), "8-bit RGB"),
        "palette.png": (png_bytes(gray, color=3, palette=range(48)), "8-bit palette"),
        "truncated.png": (png_bytes(noise)[:900], "damaged"),
        "crc.png": (png_bytes(noise).replace(b"IDAT", b"IDAX"), "damaged"),
        "text.png": (b"not an image at all", "not a PNG"),
        "empty.png": (b"", "not a PNG"),
        "huge.png": (png_bytes(gray, claim=(60000, 60000)), "60000"),
        "long.png": (png_bytes(gray, claim=(8000, 8000)), "too short"),
        "empty.npy": (b"", ".npy"),
        "text.npy": (b"\x93NUMPY\x01\x00nonsense", ".npy"),
        "missing.png": (None, "No such file"),
        "missing.npy": (None, "No such file"),
    }


@pytest.mark.parametrize("name", bad_slices())
def test_bad_slices_are_named(tmp_path, name):
    content, reason = bad_slices()[name]
    if content is not None:
        put(tmp_path / name, content)
    for reader in (
        (read_slice, read_mask) if name.endswith("png") and name != "palette.png" else (read_slice,)
    ):
        with pytest.raises(DataError) as error:
            reader(tmp_path / name)
        message = str(error.value)
        assert str(tmp_path / name) in message and reason in message and "\n" not in message


@pytest.mark.parametrize(
    "array",
    [np.zeros((3, 4, 5)), np.zeros(7), np.zeros((0, 5)), np.zeros((2, 2), complex), np.array([["a"]])],
    ids=["3d", "1d", "empty", "complex", "text"],
)
def test_bad_npy_is_named(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match="a.npy"):
        read_slice(tmp_path / "a.npy")


def test_npy_with_code_in_it_is_not_run(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[{"code": 1}]], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps([1, 2]))
    for name in ("a.npy", "b.npy"):
        with pytest.raises(DataError, match=name):
            read_slice(tmp_path / name)


# ---- Lists ---------------------------------------------------------------------------------------


def test_list_styles(tmp_path):
    """mmcls: a class label behind the path; mmseg: no suffix; Windows line ends, blank lines, spaces in
    paths."""
    path = tmp_path / "train_abdomen.txt"
    lines = [
        "a/1.png 0",
        "a/2.PNG\t5",
        "",
        "b/img0001_slice003",
        "c 1/x y.npy 3",
        "d/4 liver",
        "./e/5.png",
        "f 2/6",
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    expected = ["a/1.png", "a/2.PNG", "b/img0001_slice003", "c 1/x y.npy", "d/4", "e/5.png", "f 2/6"]
    assert read_list(path) == expected


def test_bad_lists(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("empty.txt", "binary.txt", "absent.txt"):
        with pytest.raises(DataError, match=name):
            read_list(tmp_path / name)
    for outside in ("/etc/passwd", "../x.png", "a/../../x.png"):
        (tmp_path / "out.txt").write_text(f"a/1.png\n{outside}\n")
        with pytest.raises(DataError, match="leaves the data root"):
            read_list(tmp_path / "out.txt")
    for odd in ("a\\1.png", "..\\..\\x.png", "a/\0.png", "\0" * 4000):
        (tmp_path / "odd.txt").write_text(f"a/1.png\n{odd}\n")
        with pytest.raises(DataError, match="odd.txt: .* has a backslash or a NUL") as error:
            read_list(tmp_path / "odd.txt")
        assert str(error.value).isprintable() and len(str(error.value)) < 1500
    for unreadable in (tmp_path, tmp_path / "odd.txt/x.txt", tmp_path / "a\0.txt"):
        with pytest.raises(DataError):
            read_list(unreadable)


@pytest.mark.parametrize(
    "name, case",
    [
        ("case1/0001.png", "case1"),
        ("site/case1/0001", "site/case1"),
        ("train/img0001_slice012.png", "img0001_slice"),
        ("img0001_012.png", "img0001"),
        ("img0001-012-ct.npy", "img0001"),
        ("val/0007.png", "val"),
        ("0007.png", "case"),
        ("test/lonely.png", "lonely"),
    ],
)
def test_case_of(name, case):
    assert case_of(name) == case


def test_find_slices_adds_suffixes(tmp_path):
    for name in ("a/1.png", "a/2.npy", "b/3.png", "b/3.npy", "4.png"):
        put(tmp_path / name, b"")
    (tmp_path / "a/1").mkdir()
    names = ["a/1", "a/2", "b/3", "4", "a/1.png", "a/9", "z/1", "a/1.npy"]
    expected = ["a/1.png", "a/2.npy", "b/3.png", "4.png", "a/1.png", None, None, None]
    assert find_slices(tmp_path, names) == expected


def test_split_cases():
    for count, sizes in ((2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)), (40, (24, 8, 8))):
        cases = [f"case{index}" for index in range(count)]
        parts = split_cases(cases)
        assert tuple(map(len, parts.values())) == sizes
        assert sorted(sum(parts.values(), [])) == sorted(cases)


# ---- Datasets ------------------------------------------------------------------------------------


def test_datasets_read_what_was_written(tmp_path):
    names = random_set(tmp_path)
    slices = SliceDataset(tmp_path, "train.txt")
    pairs = SegmentationDataset(tmp_path, "train.txt", num_classes=4)
    assert len(slices) == 9 and slices.names == names and slices.cases == [name[0] for name in names]
    assert slices.cases[2:5] == ["a", "b", "b"] and slices.cases[-1] == "c"
    assert slices.stored == "hu" and slices.size == pairs.size == (12, 10)
    for index, name in enumerate(names):
        with Image.open(tmp_path / "images" / name) as image:
            hu = np.array(image).astype(float) - 1024
        with Image.open(tmp_path / "masks" / name) as image:
            labels = np.array(image)
        image, mask = pairs[index]
        assert slices[index].shape == (1, 12, 10) and slices[index].dtype == torch.float32
        assert np.array_equal(slices[index][0], hu) and torch.equal(image, slices[index])
        assert np.array_equal(mask, labels) and mask.dtype == torch.int64
        assert np.array_equal(pairs.own_mask(index), labels)
        assert np.array_equal(pairs.to_own_grid(labels, index), labels)
    assert pairs.spacing("a") is None


def test_mmseg_layout(tmp_path):
    """img_dir/train, ann_dir/train, a list without suffixes; `{split}` is the list's name."""
    gray = np.full((6, 6), 7, np.uint8)
    for split in ("train", "val"):
        for index in range(2):
            put(tmp_path / f"img_dir/{split}/img0001_slice00{index}.png", gray)
            put(tmp_path / f"ann_dir/{split}/img0001_slice00{index}.png", gray)
        (tmp_path / f"{split}.txt").write_text("img0001_slice000\nimg0001_slice001\n")
    dataset = SegmentationDataset(tmp_path, "val.txt", "img_dir/{split}", "ann_dir/{split}")
    assert (
        dataset.stored == "uint8"
        and dataset[1][0].unique().tolist() == [7]
        and dataset.cases[0] == "img0001_slice"
    )
    assert dataset.mask_path(0) == tmp_path / "ann_dir/val/img0001_slice000.png"


def test_missing_files_are_counted(tmp_path):
    names = random_set(tmp_path)
    for name in names[1:6]:
        (tmp_path / "images" / name).unlink()
    with pytest.raises(
        DataError, match=r"train.txt: 5 of 9 files are missing .*: a/01.png, a/02.png, b/00.png \.\.\."
    ):
        SliceDataset(tmp_path, "train.txt")
    random_set(tmp_path)
    (tmp_path / "masks" / names[0]).unlink()
    with pytest.raises(DataError, match=r"1 of 9 files are missing .*masks: a/00.png"):
        SegmentationDataset(tmp_path, "train.txt")
    with pytest.raises(DataError, match="no such data set"):
        SliceDataset(tmp_path / "nowhere", "train.txt")


def test_skip_bad_leaves_out_and_replaces(tmp_path, caplog):
    names = random_set(tmp_path)
    slices = [*SliceDataset(tmp_path)]
    (tmp_path / "images" / names[1]).unlink()
    for bad in (names[0], names[4], names[5]):
        put(tmp_path / "images" / bad, b"not a PNG")
    put(tmp_path / "images" / names[8], np.zeros((12, 10), np.uint8))  # of another kind: no HU
    with pytest.raises(DataError, match="1 of 9 files are missing"):
        SliceDataset(tmp_path)
    dataset = SliceDataset(tmp_path, skip_bad=True)
    assert dataset.names == [names[0], *names[2:]] and dataset.size == (12, 10)
    given = [2, 2, 3, 6, 6, 6, 7, 2]  # of the whole list, for 0, 2, 3, 4, 5, 6, 7 and 8
    assert all(torch.equal(dataset[index], slices[number]) for index, number in enumerate(given))
    left_out, skipped = caplog.messages
    assert left_out.startswith("warning: train.txt: 1 of 9 files are missing") and names[1] in left_out
    assert skipped.startswith("warning: skipped unreadable slice: ") and names[0] in skipped
    with pytest.raises(IndexError):
        dataset[8]
    for name in names:
        (tmp_path / "images" / name).unlink(missing_ok=True)
    with pytest.raises(DataError, match="9 of 9 files are missing"):
        SliceDataset(tmp_path, skip_bad=True)


def test_too_many_bad_slices_are_an_error(tmp_path):
    names = random_set(tmp_path, cases=["a"], slices=130, shape=(2, 2))
    dataset = SliceDataset(tmp_path, skip_bad=True)
    for name in names[10:115]:
        put(tmp_path / "images" / name, b"")
    assert torch.equal(dataset[16], dataset[115])
    with pytest.raises(DataError, match="114.png: not a PNG image; 100 unreadable slices in a row"):
        dataset[15]


def test_bad_masks_are_named(tmp_path):
    names = random_set(tmp_path)
    put(tmp_path / "masks" / names[0], np.zeros((12, 11), np.uint8))
    put(tmp_path / "masks" / names[1], np.full((12, 10), 9, np.uint8))
    put(tmp_path / "masks" / names[2], np.full((12, 10), 255, np.uint8))
    put(tmp_path / "images" / names[3], np.zeros((12, 10), np.uint8))
    dataset = SegmentationDataset(tmp_path, "train.txt", num_classes=9)
    with pytest.raises(DataError, match=rf"{names[0]}.*\(12, 11\).*\(12, 10\)"):
        dataset[0]
    with pytest.raises(DataError, match=rf"{names[1]}: label 9, .* 9 classes"):
        dataset[1]
    assert dataset[2][1].unique().tolist() == [255]
    with pytest.raises(DataError, match=f"{names[3]}: 8-bit values"):
        dataset[3]


def test_slices_of_other_sizes_are_scaled_to_fit(tmp_path, caplog):
    """Twice the size: halved and whole. Wide: bars of air and 255 above and below. Said once."""
    images, masks = tmp_path / "images/a", tmp_path / "masks/a"
    flat = {"1": (8, 8), "2": (16, 16), "3": (4, 16)}
    for name, shape in flat.items():
        put(images / f"{name}.png", np.full(shape, 1064, np.uint16))
        put(masks / f"{name}.png", np.full(shape, 3, np.uint8))
    (tmp_path / "train.txt").write_text("a/1\na/2\na/3\n")
    dataset = SegmentationDataset(tmp_path, "train.txt")
    assert dataset.size == (8, 8)
    pairs = [dataset[index] for index in range(3)]
    for image, mask in pairs[:2]:
        assert torch.allclose(image, torch.full((1, 8, 8), 40.0)) and (mask == 3).all()
    image, mask = pairs[2]
    assert (image[0, 3:5] == 40).all() and (image[0, :3] == -1024).all() and (image[0, 5:] == -1024).all()
    assert (mask[3:5] == 3).all() and (mask[:3] == 255).all() and (mask[5:] == 255).all()
    assert sum("different sizes" in message for message in caplog.messages) == 1
    restored = dataset.to_own_grid(mask.numpy().astype(np.uint8), 2)
    assert restored.shape == (4, 16) and (restored == 3).all()
    assert SliceDataset(tmp_path, "train.txt", size=(5, 9))[0].shape == (1, 5, 9)


def test_dataset_in_worker_processes(tmp_path):
    random_set(tmp_path)
    dataset = SegmentationDataset(tmp_path, "train.txt")
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1)
    images = torch.cat([images for images, _ in loader])
    assert torch.equal(images, torch.stack([dataset[index][0] for index in range(9)]))


def test_all_slices_without_a_list(tmp_path):
    names = random_set(tmp_path)
    put(tmp_path / "images/a/notes.txt", b"")
    assert SliceDataset(tmp_path, None).names == sorted(names)


def test_intensity():
    windowed = Intensity([-160, 240], 0.5, 0.25)
    hu = torch.tensor([-1000.0, -160, 40, 240, 3000])
    assert windowed.to_unit(hu).tolist() == [0, 0, 0.5, 1, 1]
    assert windowed(hu).tolist() == [-2, -2, 0, 2, 2]
    assert np.array_equal(windowed(hu.numpy()), windowed(hu).numpy())
    unscaled = Intensity(None, 884.5, 983.7)
    assert torch.allclose(unscaled(hu), (hu - 884.5) / 983.7)
    for intensity in (windowed, unscaled):
        assert Intensity(**json.loads(json.dumps(intensity.as_dict()))) == intensity
    assert windowed != Intensity([-160, 241], 0.5, 0.25)
    for wrong in ({"window": (240, -160)}, {"window": (1, 2, 3)}, {"std": 0}):
        with pytest.raises(DataError):
            Intensity(**wrong)


def test_class_names_and_spacing(tmp_path):
    assert layout.class_names(tmp_path, 3) == ["background", "class 1", "class 2"]
    assert layout.class_names(tmp_path, ["background", "liver"]) == ["background", "liver"]
    with pytest.raises(DataError, match="classes.json"):
        layout.class_names(tmp_path)
    random_set(tmp_path)
    (tmp_path / "classes.json").write_text('["background", "spleen"]')
    (tmp_path / "spacing.json").write_text('{"a": [5, 0.8, 0.7]}')
    assert layout.class_names(tmp_path) == ["background", "spleen"]
    dataset = SegmentationDataset(tmp_path, "train.txt")
    assert dataset.spacing("a") == (5, 0.8, 0.7) and dataset.spacing("b") is None
    (tmp_path / "spacing.json").write_text('{"a": [5, 0.8]}')
    with pytest.raises(DataError, match="spacing.json"):
        SegmentationDataset(tmp_path, "train.txt")
    (tmp_path / "classes.json").write_text("{")
    with pytest.raises(DataError, match="classes.json"):
        layout.class_names(tmp_path)


def test_every_organ_has_a_color_of_its_own():
    colors = organs.ORGAN_COLORS.astype(int)
    assert colors.shape == (256, 3) and not colors[0].any()
    distances = np.abs(colors[:14, None] - colors[None, :14]).sum(2) + 999 * np.eye(14, dtype=int)
    assert distances.min() > 80


def test_an_organ_keeps_its_color_under_another_number_and_spelling():
    names = ["background", "tumour", "Liver", "kidney_right", "spleen", "liver"]
    colors = class_colors(names)
    assert (colors[2:5] == organs.ORGAN_COLORS[[6, 2, 1]]).all()
    assert len({tuple(color) for color in colors[:6]}) == 6  # the second liver and the tumour have others
    assert (class_colors(organs.BTCV_ORGANS) == organs.ORGAN_COLORS).all()
    assert (class_colors([f"class {i}" for i in range(255)]) == organs.ORGAN_COLORS).all()


# ---- phantom, pack, check, show ------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "set"
    assert (
        commands.main(
            ["phantom", "--out", str(out), "--cases", "5", "--slices", "6", "--size", "48", "--seed", "7"]
        )
        == 0
    )
    return out


def test_phantom_set(phantom, capsys):
    lists = {split: read_list(phantom / f"{split}.txt") for split in ("train", "val", "test", "unlabelled")}
    cases = {split: {*map(case_of, names)} for split, names in lists.items()}
    assert [len(cases[split]) for split in ("train", "val", "test")] == [3, 1, 1]
    assert not cases["train"] & cases["val"] and not cases["test"] & (cases["train"] | cases["val"])
    assert cases["unlabelled"] == cases["train"]
    hu, labels = phantom_case(7 * 100_003, 6, 48)
    index = 3
    assert np.array_equal(read_slice(phantom / f"images/phantom000/{index:03d}.png"), hu[index])
    assert np.array_equal(read_mask(phantom / f"masks/phantom000/{index:03d}.png"), labels[index])
    assert layout.class_names(phantom) == organs.BTCV_ORGANS
    dataset = SegmentationDataset(phantom, "val.txt", num_classes=14)
    assert dataset.spacing(dataset.cases[0]) == pytest.approx(phantom_spacing(6, 48))


def test_phantom_is_reused_redone_or_refused(phantom, capsys):
    same = ("phantom", "--out", phantom, "--cases", 5, "--slices", 6, "--size", 48, "--seed", 7)
    image = phantom / "images/phantom000/000.png"
    written = image.stat().st_mtime_ns
    code, output, _ = run(capsys, *same)
    assert code == 0 and "there already" in output and image.stat().st_mtime_ns == written
    code, _, error = run(capsys, *same[:-1], 8)
    assert code == 2 and one_line_of(error) and "other arguments" in error
    content = image.read_bytes()
    about = json.loads((phantom / "phantom.json").read_text())
    (phantom / "phantom.json").write_text(
        json.dumps(about | {"complete": False})
    )  # as an interruption leaves it
    image.write_bytes(b"")
    code, output, _ = run(capsys, *same)
    assert code == 0 and image.read_bytes() == content
    code, _, error = run(capsys, "phantom", "--out", phantom / "images")
    assert code == 2 and one_line_of(error) and "not empty" in error


def test_pack(phantom, tmp_path, capsys):
    name = tmp_path / "sub/packed"
    code, output, _ = run(capsys, "pack", "--root", phantom, "--list", "train.txt", "--out", name)
    assert code == 0 and "18 slices of 48 x 48 px; cases: 3" in output
    slices = SliceDataset(phantom, "train.txt")
    array = np.load(tmp_path / "sub/packed.npy")
    assert array.shape == (18, 48, 48) and array.dtype == np.int16
    about = json.loads((tmp_path / "sub/packed.json").read_text())
    assert about["names"] == slices.names and {*about["spacing"]} >= {*about["cases"]}
    for root in (name, f"{name}.npy", f"{name}.json"):
        packed = pickle.loads(pickle.dumps(SliceDataset(root, "any.txt")))
        assert packed.names == slices.names and packed.cases == slices.cases and packed.stored == "hu"
        assert all(torch.equal(packed[index], slices[index]) for index in range(18))
        assert torch.equal(packed[-1], slices[17])
    with pytest.raises(DataError, match="holds no masks"):
        SegmentationDataset(name, "train.txt")
    (tmp_path / "sub/packed.json").write_text(json.dumps(about | {"names": about["names"][1:]}))
    with pytest.raises(DataError, match="names: a list of 18"):
        SliceDataset(name)
    (tmp_path / "sub/packed.json").write_text(json.dumps(about | {"cases": [*range(18)]}))
    with pytest.raises(DataError, match="cases: a list of 18"):
        SliceDataset(name)
    (tmp_path / "sub/packed.json").unlink()
    with pytest.raises(DataError, match="packed.json"):
        SliceDataset(name)


def test_check_counts_by_hand(tmp_path, capsys):
    names = random_set(tmp_path, cases=("a", "b"), slices=2)
    (tmp_path / "val.txt").write_text("\n".join(names[2:]))
    (tmp_path / "train.txt").write_text("\n".join(names[:2]))
    code, output, _ = run(capsys, "check", "--root", tmp_path)
    train = np.stack([read_slice(tmp_path / "images" / name) for name in names[:2]])
    unit = np.clip((train + 160) / 400, 0, 1)
    masks = np.stack([read_mask(tmp_path / "masks" / name) for name in names])
    body = train[train > -500]
    assert code == 0 and "4 files read, 0 bad" in output and "12 x 10 px: 4 slices" in output
    assert f"mean {train.mean():.1f}, std {train.std():.1f}" in output
    assert f"mean {body.mean():.1f}, std {body.std():.1f}" in output
    assert f"data.mean={unit.mean():.4f} data.std={unit.std():.4f}" in output
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line[:5].strip().isdigit()}
    for label in range(4):
        assert rows[str(label)][-3:] == [str((masks == label).sum()), "4", "2"]


def test_check_names_every_bad_file(tmp_path, capsys):
    names = random_set(tmp_path)
    (tmp_path / "classes.json").write_text('["background", "x", "y", "z"]')
    put(tmp_path / "images" / names[0], png_bytes(np.zeros((12, 10), np.uint16))[:45])
    (tmp_path / "images" / names[1]).unlink()
    (tmp_path / "masks" / names[2]).unlink()
    put(tmp_path / "masks" / names[3], np.zeros((10, 12), np.uint8))
    put(tmp_path / "masks" / names[4], np.full((12, 10), 4, np.uint8))
    code, output, _ = run(capsys, "check", "--root", tmp_path)
    bad = [line for line in output.splitlines() if line.startswith("bad: ")]
    assert code == 1 and len(bad) == 5 and "5 bad" in output
    reasons = ("damaged", "missing", "mask", "(10, 12)", "label 4")
    for name, reason in zip(names, reasons):
        assert any(name in line and reason in line for line in bad), (name, bad)


def test_check_without_masks_and_with_leaks(tmp_path, capsys):
    for index in range(3):
        put(tmp_path / f"images/a/{index}.png", np.full((4, 4), 50 * index, np.uint8))
    (tmp_path / "train_abdomen.txt").write_text("a/0.png 0\na/1.png 0\na/2.png 0\n")
    code, output, _ = run(capsys, "check", "--root", tmp_path)
    assert code == 0 and "masks not needed" in output and "data.window=[0,255]" in output
    (tmp_path / "train.txt").write_text("a/0\na/1\n")
    (tmp_path / "test.txt").write_text("a/1\na/2\n")
    code, output, _ = run(capsys, "check", "--root", tmp_path)
    assert code == 0 and "1 slices of val or test are in other lists" in output and "the first: a" in output


def test_show(phantom, tmp_path, capsys):
    code, _, error = run(
        capsys, "show", "--root", phantom, "--list", "train.txt", "--out", tmp_path / "a.png"
    )
    assert code == 0, error
    page = np.array(Image.open(tmp_path / "a.png"))
    assert (page == organs.ORGAN_COLORS[6]).all(2).sum() > 200  # the outlines of the liver
    code, _, error = run(
        capsys,
        "show",
        "--root",
        phantom,
        "--list",
        "train.txt",
        "--views",
        "--count",
        2,
        "--out",
        tmp_path / "b.png",
    )
    assert code == 0 and Image.open(tmp_path / "b.png").width > 800, error


def test_command_line_errors_are_one_line(tmp_path, capsys):
    random_set(tmp_path / "set")
    (tmp_path / "file").write_text("")
    wrong = [
        ("phantom", "--out", tmp_path / "file"),
        ("phantom", "--out", tmp_path / "p", "--cases", 1),
        ("phantom", "--out", tmp_path / "p", "--cases", "many"),
        ("phantom",),
        ("packk",),
        (),
        ("pack", "--root", tmp_path / "set", "--list", "nope.txt", "--out", tmp_path / "p"),
        ("check", "--root", tmp_path / "nowhere"),
        ("show", "--root", tmp_path / "set", "--list", "train.txt", "--out", tmp_path / "file/page.png"),
        ("slice", "--images", tmp_path / "nope.nii", "--out", tmp_path / "s"),
    ]
    for argv in wrong:
        code, _, error = run(capsys, *argv)
        assert code == 2 and one_line_of(error), (argv, error)


# ---- NIfTI ---------------------------------------------------------------------------------------


@pytest.fixture
def nibabel():
    return pytest.importorskip("nibabel")


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


def test_radiological_view_against_nibabel(tmp_path, nibabel):
    """Whatever the affine: the array is nibabel's closest canonical (RAS) one, as slices from below, rows
    from anterior, columns from the patient's right. Labels return to the file's own grid."""
    rng = np.random.default_rng(0)
    for codes, affine in affines(nibabel):
        voxels = rng.integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
        original = nibabel.Nifti1Image(voxels, affine)
        original.header["descrip"] = b"kept"
        nibabel.save(original, tmp_path / "v.nii.gz")
        canonical = nibabel.as_closest_canonical(original)
        ras = np.asarray(canonical.dataobj)
        zooms = canonical.header.get_zooms()
        axial = volumes.read_volume(tmp_path / "v.nii.gz")
        assert np.array_equal(axial.array, ras[::-1, ::-1].transpose(2, 1, 0)), codes
        assert axial.spacing == pytest.approx(zooms[::-1], rel=1e-5)
        coronal = volumes.read_volume(
            tmp_path / "v.nii.gz", axis=1
        )  # rows from superior, columns from the right
        assert np.array_equal(coronal.array, ras[::-1, ::-1, ::-1].transpose(1, 2, 0))
        sagittal = volumes.read_volume(
            tmp_path / "v.nii.gz", axis=0
        )  # rows from superior, columns from anterior
        assert np.array_equal(sagittal.array, ras[::-1, ::-1, ::-1].transpose(0, 2, 1))
        assert sagittal.spacing == pytest.approx((zooms[0], zooms[2], zooms[1]), rel=1e-5)
        for volume in (axial, coronal, sagittal):
            labels = ((volume.array > 0) * 3 + (volume.array > 500)).astype(np.uint8)
            volumes.write_labels(tmp_path / "out.nii.gz", labels, volume)
            written = nibabel.load(tmp_path / "out.nii.gz")
            assert np.array_equal(np.asarray(written.dataobj), (voxels > 0) * 3 + (voxels > 500))
            assert written.get_data_dtype() == np.uint8 and np.allclose(written.affine, affine, atol=1e-4)
            assert bytes(written.header["descrip"]).startswith(b"kept")


def test_volume_with_slope_and_a_fourth_axis(tmp_path, nibabel):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header.set_slope_inter(2, -100)
    nibabel.save(image, tmp_path / "v.nii")
    volume = volumes.read_volume(tmp_path / "v.nii")
    saved = np.asarray(nibabel.load(tmp_path / "v.nii").dataobj)[..., 0]
    assert np.allclose(volume.array, saved[::-1, ::-1].transpose(2, 1, 0))
    volumes.write_labels(tmp_path / "l.nii", (volume.array > saved.mean()).astype(np.uint8), volume)
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "l.nii").dataobj)[..., 0], saved > saved.mean())


def test_bad_volumes_are_named(tmp_path, nibabel, capsys):
    whole = nibabel.Nifti1Image(
        np.random.default_rng(0).integers(0, 9, (9, 9, 9)).astype(np.int16), np.eye(4)
    )
    nibabel.save(whole, tmp_path / "v.nii")
    content = (tmp_path / "v.nii").read_bytes()
    huge = bytearray(content)
    struct.pack_into("<8h", huge, 40, 3, 9000, 9000, 9000, 1, 1, 1, 1)
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3, 2), np.int16), np.eye(4)), tmp_path / "4d.nii")
    files = {
        "text.nii": b"hello",
        "empty.nii.gz": b"",
        "short.nii": content[:700],
        "huge.nii": bytes(huge),
        "wrong.nii.gz": content,
        "4d.nii": (tmp_path / "4d.nii").read_bytes(),
        "image.png": png_bytes(np.zeros((4, 4), np.uint8)),
    }
    for name, bad in files.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DataError, match=name) as error:
            volumes.read_volume(tmp_path / name)
        assert "\n" not in str(error.value)
        code, _, error = run(capsys, "slice", "--images", tmp_path / name, "--out", tmp_path / "out")
        assert code == 2 and one_line_of(error) and not list((tmp_path / "out").glob("*.txt")), (name, error)


def test_missing_nibabel_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    (tmp_path / "v.nii").write_bytes(b"")
    code, _, error = run(capsys, "slice", "--images", tmp_path / "v.nii", "--out", tmp_path / "out")
    assert code == 2 and one_line_of(error) and "pip install nibabel" in error


def save_volume(nibabel, path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([0.8, 0.9, 2.5, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def test_slice_folders(tmp_path, nibabel, capsys):
    """BTCV's names, a label map, one image without labels; read back and compared with nibabel's canonical
    voxels."""
    rng = np.random.default_rng(0)
    affine = dict(affines(nibabel))["SRP"]
    volumes = {}
    for number in range(1, 7):
        hu = rng.integers(-1200, 3000, (5, 8, 6)).astype(np.int16)
        labels = rng.choice([0, 5, 52, 77], (5, 8, 6)).astype(np.int16)
        save_volume(nibabel, tmp_path / f"img/img{number:04d}.nii.gz", hu, affine)
        if number < 6:
            save_volume(nibabel, tmp_path / f"label/label{number:04d}.nii.gz", labels, affine)
        volumes[f"img{number:04d}"] = hu, labels
    save_volume(nibabel, tmp_path / "label/label0099.nii.gz", labels, affine)
    (tmp_path / "map.json").write_text('{"5": 6, "52": 8, "15": 5}')
    out = tmp_path / "out"
    argv = ("slice", "--images", tmp_path / "img", "--labels", tmp_path / "label", "--out", out)
    code, output, error = run(capsys, *argv, "--label-map", tmp_path / "map.json")
    assert code == 0, error
    for line in ("paired 5 of 6", "img0006.nii.gz", "label0099.nii.gz", "15 (esophagus)"):
        assert line in output
    lists = {split: read_list(out / f"{split}.txt") for split in ("train", "val", "test", "unlabelled")}
    cases = {split: {*map(case_of, names)} for split, names in lists.items()}
    assert [len(cases[split]) for split in ("train", "val", "test")] == [3, 1, 1]
    assert cases["unlabelled"] == cases["train"] | {"img0006"}
    assert layout.class_names(out) == organs.BTCV_ORGANS
    assert json.loads((out / "spacing.json").read_text())["img0001"] == pytest.approx(
        volumes.read_volume(tmp_path / "img/img0001.nii.gz").spacing
    )
    for case, (hu, labels) in volumes.items():
        canonical = [nibabel.as_closest_canonical(nibabel.Nifti1Image(a, affine)) for a in (hu, labels)]
        view, truth = (np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0) for image in canonical)
        names = [f"{case}/{index:04d}.png" for index in range(len(view))]
        read = np.stack([read_slice(out / "images" / name) for name in names])
        assert np.array_equal(read, view.clip(-1024))
        if case != "img0006":
            masks = np.stack([read_mask(out / "masks" / name) for name in names])
            assert np.array_equal(masks, (truth == 5) * 6 + (truth == 52) * 8)
    assert run(capsys, "check", "--root", out)[0] == 0


@pytest.mark.parametrize(
    "images, labels",
    [
        ("Case_00001_0000 Case_00002_0000", "Case_00001 Case_00002"),  # AbdomenCT-1K
        ("img0001 img0002", "label0001 label0002"),  # BTCV
        ("liver_01_0000 liver_12_0000", "liver_01 liver_12"),  # nnU-Net
        ("siteA_1 siteB_1", "siteA_1 siteB_1"),
    ],
)
def test_pairing(tmp_path, images, labels):
    from prepare.slicing import pair_volumes

    for folder, names in (("images", images), ("labels", labels)):
        for name in names.split():
            put(tmp_path / folder / f"{name}.nii.gz", b"")
    pairs = pair_volumes(tmp_path / "images", tmp_path / "labels")
    assert [pair.image.name for pair in pairs] == [f"{name}.nii.gz" for name in images.split()]
    assert [pair.case for pair in pairs] == [name.removesuffix("_0000") for name in images.split()]
    assert [pair.labels.name for pair in pairs] == [f"{name}.nii.gz" for name in labels.split()]


def test_ambiguous_or_hopeless_pairing_is_refused(tmp_path):
    from prepare.slicing import pair_volumes

    for name in ("images/a_1", "images/b_1", "labels/c_1", "other/c_7"):
        put(tmp_path / f"{name}.nii.gz", b"")
    with pytest.raises(DataError, match="a_1.nii.gz and b_1.nii.gz"):
        pair_volumes(tmp_path / "images", tmp_path / "labels")
    (tmp_path / "images/b_1.nii.gz").unlink()
    with pytest.raises(DataError, match="no image has the number"):
        pair_volumes(tmp_path / "images", tmp_path / "other")


def nnunet_folder(nibabel, root, labels, cases=5):
    """A raw data set of nnU-Net, two channels a case, with ids 0 to 3 in its labels."""
    for number in range(1, cases + 1):
        voxels = np.random.default_rng(number).integers(0, 4, (6, 5, 4)).astype(np.int16)
        for channel in ("_0000", "_0001"):
            save_volume(nibabel, root / f"imagesTr/ct_{number:03d}{channel}.nii.gz", voxels * 100)
        save_volume(nibabel, root / f"labelsTr/ct_{number:03d}.nii.gz", voxels)
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "channel_names": {"0": "CT"}}))
    return ("slice", "--images", root / "imagesTr", "--labels", root / "labelsTr", "--out", root / "out")


def test_dicom_has_to_be_converted_first(tmp_path, nibabel, capsys):
    (tmp_path / "scan/series").mkdir(parents=True)
    (tmp_path / "scan/series/1.dcm").write_bytes(b"DICM")
    code, _, error = run(capsys, "slice", "--images", tmp_path / "scan", "--out", tmp_path / "out")
    assert code == 2 and "DICOM has to be converted first" in error


@pytest.mark.parametrize(
    ("labels", "ignored"),
    [
        ({"background": 0, "liver": 1, "spleen": 2, "aorta": 3}, False),
        ({"0": "background", "1": "liver", "2": "spleen", "3": "aorta"}, False),
        ({"background": 0, "liver": 1, "spleen": 2, "ignore": 3}, True),
    ],
)
def test_nnunet_folders_bring_their_class_names(tmp_path, nibabel, capsys, labels, ignored):
    code, output, error = run(capsys, *nnunet_folder(nibabel, tmp_path, labels))
    assert code == 0, error
    assert "other channels (left out): 5" in output and "paired 5 of 5" in output
    names = ["background", "liver", "spleen", "aorta"]
    assert layout.class_names(tmp_path / "out") == names[: 3 if ignored else 4]
    volume = volumes.read_volume(tmp_path / "labelsTr/ct_002.nii.gz").array
    masks = [read_mask(tmp_path / f"out/masks/ct_002/{index:04d}.png") for index in range(len(volume))]
    assert np.array_equal(np.stack(masks), np.where(volume == 3, 255 if ignored else 3, volume))


def test_a_dataset_json_that_cannot_be_used_is_refused(tmp_path, nibabel, capsys):
    for labels in ({"background": 0, "organs": [1, 2]}, {"background": 0, "liver": 5}, ["liver"]):
        code, _, error = run(capsys, *nnunet_folder(nibabel, tmp_path, labels, cases=2))
        assert code == 2 and one_line_of(error) and "dataset.json" in error


def test_a_split_is_a_file_of_names_or_numbers_or_three_fractions(tmp_path, nibabel, capsys):
    labels = {"background": 0, "liver": 1, "spleen": 2, "aorta": 3}
    argv = nnunet_folder(nibabel, tmp_path, labels, cases=10)
    split = tmp_path / "split.json"

    def cases_of(split):
        return sorted({*map(case_of, read_list(tmp_path / f"out/{split}.txt"))})

    split.write_text('{"train": ["ct_001", 2, "case0003"], "test": [10]}')
    code, _, error = run(capsys, *argv, "--split", split)
    assert code == 0, error
    assert cases_of("train") == ["ct_001", "ct_002", "ct_003"] and cases_of("test") == ["ct_010"]
    assert not (tmp_path / "out/val.txt").exists() and len(cases_of("unlabelled")) == 9
    assert run(capsys, *argv, "--split", "0.5,0.2,0.3")[0] == 0
    assert [len(cases_of(part)) for part in ("train", "val", "test")] == [5, 2, 3]
    for bad in (
        '{"train": [1], "test": [1]}',
        '{"train": [1]}',
        '{"train": [99], "test": [1]}',
        '{"tset": [1]}',
    ):
        split.write_text(bad)
        code, _, error = run(capsys, *argv, "--split", split)
        assert code == 2 and one_line_of(error) and "split.json" in error, error
    for bad in ("0.5,0.5", "0.5,0.2,0.2", "0,0.5,0.5", "1,0,0"):
        code, _, error = run(capsys, *argv, "--split", bad)
        assert code == 2 and one_line_of(error) and bad in error, error


def test_the_published_btcv_split():
    """Test cases as listed by TransUNet and those who follow it."""
    from prepare.slicing import read_split

    numbers = [*range(1, 11), *range(21, 41)]
    split = read_split("configs/btcv_split.json", [f"img{number:04d}" for number in numbers])
    test = [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert split["test"] == [f"img{number:04d}" for number in test]
    assert len(split["train"]) == 18 and not split["val"] and not {*split["train"]} & {*split["test"]}


def test_slicing_goes_on_where_it_was_and_past_a_bad_volume(tmp_path, nibabel, capsys):
    argv = nnunet_folder(nibabel, tmp_path, {"background": 0, "liver": 1, "spleen": 2, "aorta": 3})
    bad = tmp_path / "imagesTr/ct_003_0000.nii.gz"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:50])
    code, _, error = run(capsys, *argv)
    assert code == 2 and one_line_of(error) and "ct_003_0000" in error and "1 of 5" in error
    assert not list((tmp_path / "out").glob("*.txt"))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/images").rglob("*.png")}
    assert {path.parent.name for path in made} == {f"ct_{number:03d}" for number in (1, 2, 4, 5)}
    bad.write_bytes(whole)
    assert run(capsys, *argv)[0] == 0
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())
    assert (tmp_path / "out/images/ct_003/0000.png").exists()
    save_volume(nibabel, tmp_path / "labelsTr/ct_001.nii.gz", np.zeros((6, 5, 4), np.int16))
    assert run(capsys, *argv)[0] == 0
    assert not read_mask(tmp_path / "out/masks/ct_001/0000.png").any()


def test_one_case_is_divided_into_blocks(tmp_path, nibabel, capsys):
    """Slices 3 to 26 of 30 have labels: 60/20/20 of the 20 that two gaps of 2 leave."""
    hu = np.zeros((4, 4, 30), np.int16)
    labels = np.zeros((4, 4, 30), np.uint8)
    labels[1, 1, 3:27] = 2
    save_volume(nibabel, tmp_path / "ct.nii.gz", hu)
    save_volume(nibabel, tmp_path / "seg.nii.gz", labels)
    argv = (
        "slice",
        "--images",
        tmp_path / "ct.nii.gz",
        "--labels",
        tmp_path / "seg.nii.gz",
        "--out",
        tmp_path / "out",
    )
    code, output, error = run(capsys, *argv)
    assert code == 0 and "one labelled case" in output and "2 slices dropped" in output, error

    def numbers(split):
        return [int(name[3:7]) for name in read_list(tmp_path / f"out/{split}.txt")]

    assert numbers("train") == [*range(3, 15)]
    assert numbers("val") == [*range(17, 21)]
    assert numbers("test") == [*range(23, 27)]
    assert numbers("unlabelled") == [*range(15), 27, 28, 29]
    assert layout.class_names(tmp_path / "out") == ["background", "class 1", "class 2"]
    labels[:, :, 8:] = 0
    save_volume(nibabel, tmp_path / "seg.nii.gz", labels)
    code, _, error = run(capsys, *argv)
    assert code == 2 and one_line_of(error) and "too few" in error
    assert not (tmp_path / "out/train.txt").exists()


def test_images_alone_are_for_pretraining(tmp_path, nibabel, capsys):
    save_volume(nibabel, tmp_path / "in/a_1.nii", np.zeros((4, 5, 6), np.float32))
    save_volume(nibabel, tmp_path / "in/a_2.nii", np.full((4, 5, 3), np.nan, np.float32))
    code, _, error = run(capsys, "slice", "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0, error
    assert len(read_list(tmp_path / "out/unlabelled.txt")) == 9 and not (tmp_path / "out/train.txt").exists()
    assert (read_slice(tmp_path / "out/images/a_2/0000.png") == -1024).all()


def test_bad_labels_and_maps(tmp_path, nibabel, capsys):
    zeros = np.zeros((4, 4, 20), np.int16)
    save_volume(nibabel, tmp_path / "ct.nii", zeros)
    bad_labels = {
        "shape": np.zeros((4, 4, 19), np.int16),
        "negative": zeros - 1,
        "high": zeros + 300,
        "half": zeros.astype(np.float32) + 0.5,
        "infinite": zeros.astype(np.float32) + np.inf,
    }
    good = np.ones_like(zeros)
    argv = ("slice", "--images", tmp_path / "ct.nii", "--out", tmp_path / "out", "--labels")
    for name, labels in bad_labels.items():
        save_volume(nibabel, tmp_path / f"{name}.nii", labels)
        code, _, error = run(capsys, *argv, tmp_path / f"{name}.nii")
        assert code == 2 and one_line_of(error) and f"{name}.nii" in error, (name, error)
    save_volume(nibabel, tmp_path / "good.nii", good)
    for name, content in (
        ("a", "{"),
        ("b", '{"x": 1}'),
        ("c", '{"1": 300}'),
        ("d", "[1]"),
        ("e", '{"1": null}'),
    ):
        (tmp_path / f"{name}.json").write_text(content)
        code, _, error = run(capsys, *argv, tmp_path / "good.nii", "--label-map", tmp_path / f"{name}.json")
        assert code == 2 and one_line_of(error) and f"{name}.json" in error, (name, error)
    assert not list((tmp_path / "out").glob("*.txt"))


@needs_ct
def test_real_ct(tmp_path, nibabel, capsys):
    """The scan of ../shared/ct: sizes, blocks, and organs on the side of the image where a radiologist
    expects them."""
    ids = (1, 2, 3, 4, 15, 5, 6, 52, 63, 64, 7, 8, 9)
    (tmp_path / "map.json").write_text(json.dumps({str(id): index for index, id in enumerate(ids, 1)}))
    volumes = ("--images", CT / "ct.nii.gz", "--labels", CT / "totalseg.nii.gz")
    code, output, error = run(
        capsys, "slice", *volumes, "--label-map", tmp_path / "map.json", "--out", tmp_path / "ct"
    )
    assert code == 0 and "15 (esophagus)" in output, error
    code, output, _ = run(capsys, "check", "--root", tmp_path / "ct")
    assert code == 0 and "101 x 122 px: 108 slices" in output and "0 bad" in output
    dataset = SegmentationDataset(tmp_path / "ct", "test.txt", num_classes=14)
    assert dataset.spacing("ct") == (3, 3, 3)
    places = {}
    for index in range(len(dataset)):
        for label in np.unique(dataset.own_mask(index)):
            places.setdefault(int(label), []).append(np.argwhere(dataset.own_mask(index) == label).mean(0))
    row, column = 0, 1
    centre = {label: np.mean(at, axis=0) for label, at in places.items()}
    assert centre[6][column] < 61 < centre[1][column]  # liver at image left, spleen at image right
    assert centre[7][row] < centre[8][row]  # the stomach lies before the aorta
