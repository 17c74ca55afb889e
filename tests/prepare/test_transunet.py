"""data.py transunet, on small files in the layout that TransUNet's code reads."""

import json
import pickle
import random

import numpy as np
import pytest
from handmade import one_line_of, run
from mutations import cut_short, flip_bits, overwrite
from PIL import Image

from ct.layout import read_list
from ct.properties import read_properties
from ct.volumes import read_volume
from data import SegmentationDataset

h5py = pytest.importorskip("h5py")

ORGANS = "aorta,gallbladder,left kidney,right kidney,liver,pancreas,spleen,stomach"
SHAPES = {"case0005": (5, 20, 24), "case0006": (4, 20, 24), "case0001": (3, 20, 24)}  # the last one: test


def scans(seed=0):
    """{case: (HU, labels)}, arrays (S, H, W)."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in SHAPES.items():
        hu = rng.integers(-1024, 1500, shape).astype(np.int16)
        hu[:, :, :8] = -1000
        found[name] = hu, rng.integers(0, 9, shape)
    return found


def in_unit(hu):
    """As several public scripts make these files: float32, cut, then scaled."""
    return (np.clip(hu.astype(np.float32), -125, 275) + 125) / 400


def write(folder, lists="lists/lists_Synapse", content=None):
    """TransUNet's files: labels as integers in the one kind, as floats in the other; returns what is in
    them."""
    content = content or scans()
    for name in ("train_npz", "test_vol_h5", lists):
        (folder / name).mkdir(parents=True, exist_ok=True)
    train = []
    for case in ("case0006", "case0005"):
        hu, labels = content[case]
        for index in range(len(hu)):
            train.append(f"{case}_slice{index:03d}")
            arrays = {"image": in_unit(hu[index]), "label": labels[index].astype(np.uint8)}
            np.savez(folder / "train_npz" / f"{train[-1]}.npz", **arrays)
    with h5py.File(folder / "test_vol_h5/case0001.npy.h5", "w") as file:
        file["image"], file["label"] = in_unit(content["case0001"][0]), content["case0001"][1].astype("f4")
    (folder / lists / "train.txt").write_text("\n".join(train) + "\n")
    (folder / lists / "test_vol.txt").write_text("case0001\n")
    return content


def images_of(root, part="images"):
    paths = sorted((root / part).glob("*/*.png"))
    return {f"{path.parent.name}/{path.name}": np.asarray(Image.open(path)) for path in paths}


@pytest.mark.parametrize("lists", (".", "lists/lists_Synapse"))
def test_slices_masks_and_the_published_split(tmp_path, capsys, lists):
    content = write(tmp_path / "in", lists)
    code, said, error = run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / "set")
    assert code == 0 and "train 9 slices of 2 cases, test 3 slices of 1 cases" in said, error
    assert "data.val=null" in said and "warning" not in said
    assert len([line for line in said.splitlines() if "class 8" in line and "disagree" in line]) == 1
    images, masks = images_of(tmp_path / "set"), images_of(tmp_path / "set", "masks")
    assert len(images) == len(masks) == 12
    for case, (hu, labels) in content.items():
        for index in range(len(hu)):
            name = f"{case}/{index:03d}.png"
            assert (images[name] == hu[index].clip(-125, 275).astype(int) + 1024).all(), name
            assert masks[name].dtype == np.uint8 and (masks[name] == labels[index]).all(), name
    train, test = (read_list(tmp_path / "set" / f"{split}.txt") for split in ("train", "test"))
    assert test == ["case0001/000.png", "case0001/001.png", "case0001/002.png"]
    assert {*train} | {*test} == {*images} and train == sorted(train)
    assert read_list(tmp_path / "set/unlabelled.txt") == train
    assert not (tmp_path / "set/val.txt").exists()
    known = read_properties(tmp_path / "set")
    assert (known.kind, known.hu_offset, known.size, known.spacing) == ("hu", 1024, (20, 24), {})
    assert known.classes == ["background", *(f"class {k}" for k in range(1, 9))]
    image, mask = SegmentationDataset(tmp_path / "set", "test.txt", num_classes=9)[1]
    hu, labels = content["case0001"]
    assert (image[0].numpy() == hu[1].clip(-125, 275)).all() and (mask.numpy() == labels[1]).all()


def test_flips(tmp_path, capsys):
    hu, labels = write(tmp_path / "in")["case0006"]
    hu = hu.clip(-125, 275).astype(int) + 1024
    for flip, axes in (("rows", 0), ("columns", 1), ("both", (0, 1))):
        arguments = ("transunet", tmp_path / "in", "--out", tmp_path / "set", "--flip", flip)
        assert run(capsys, *arguments)[0] == 0  # into the same folder: made anew
        assert (images_of(tmp_path / "set")["case0006/002.png"] == np.flip(hu[2], axes)).all()
        assert (images_of(tmp_path / "set", "masks")["case0006/002.png"] == np.flip(labels[2], axes)).all()


@pytest.mark.parametrize(
    "take, transpose, rows",
    (
        (lambda array: array.transpose(2, 1, 0), (), True),
        (lambda array: array.transpose(2, 0, 1), ("--transpose",), True),
        (lambda array: array.transpose(2, 0, 1)[:, :, ::-1], ("--transpose",), False),
    ),
)
@pytest.mark.parametrize("side", (-1, 1))
def test_slices_as_others_take_them_are_turned_to_ours(tmp_path, capsys, take, transpose, rows, side):
    """From a volume whose first axis runs to the left or to the right, the second to the front."""
    nibabel = pytest.importorskip("nibabel")
    voxels = np.random.default_rng(0).integers(-125, 276, (7, 6, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([side, 1, 2, 1])), tmp_path / "ct.nii")
    (tmp_path / "in/train_npz").mkdir(parents=True)
    for index, one in enumerate(take(voxels)):
        image, label = ((one + 125) / 400).astype(np.float32), np.ones(one.shape)
        np.savez(tmp_path / f"in/train_npz/case0005_slice{index:03d}.npz", image=image, label=label)
    flip = {(True, False): "rows", (False, True): "columns", (True, True): "both"}.get((rows, side == 1))
    how = (*transpose, "--flip", flip) if flip else transpose
    assert run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / "set", *how)[0] == 0
    found = np.stack([*images_of(tmp_path / "set").values()]).astype(int) - 1024
    assert (found == read_volume(tmp_path / "ct.nii").array).all()


def test_names_of_classes(tmp_path, capsys):
    write(tmp_path / "in")
    arguments = ("transunet", tmp_path / "in", "--out", tmp_path / "set")
    for given in (ORGANS, f"background,{ORGANS}"):
        code, said, _ = run(capsys, *arguments, "--classes", given)
        assert code == 0 and "number" not in said
        assert read_properties(tmp_path / "set").classes == ["background", *ORGANS.split(",")]
    for wrong in ("liver", ORGANS + ",aorta", "", ",,,,,,,"):
        code, _, error = run(capsys, *arguments, "--classes", wrong)
        assert code == 2 and one_line_of(error) and "--classes" in error, wrong
        assert not (tmp_path / "set/train.txt").exists()


def test_cut_values_are_no_doubt_that_stops(tmp_path, capsys):
    """Air is nowhere below -200 HU: said as what it is."""
    write(tmp_path / "in")
    assert run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / "set")[0] == 0
    code, said, _ = run(capsys, "check", "--root", tmp_path / "set")
    assert code == 0 and "the lowest: HU that were cut there" in said and "no HU" not in said


def test_cases_that_are_there_are_not_made_again(tmp_path, capsys):
    write(tmp_path / "in")
    arguments = ("transunet", tmp_path / "in", "--out", tmp_path / "set")
    assert run(capsys, *arguments)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*/*/*.png")}
    gone = tmp_path / "set/masks/case0005/002.png"
    gone.unlink()  # as after a kill
    (tmp_path / "set/train.txt").unlink()
    assert run(capsys, *arguments)[0] == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*/*/*.png")}
    changed = {path.parent.name for path in before if after[path] != before[path]}
    assert after.keys() == before.keys() and changed == {"case0005"}
    assert (tmp_path / "set/train.txt").exists()
    other = scans(seed=1)
    content = write(tmp_path / "in", content=scans() | {"case0001": other["case0001"]})
    assert run(capsys, *arguments)[0] == 0
    hu = images_of(tmp_path / "set")["case0001/001.png"].astype(int) - 1024
    assert (hu == content["case0001"][0][1].clip(-125, 275)).all()


def test_what_is_not_its_own_stays(tmp_path, capsys):
    write(tmp_path / "in")
    arguments = ("transunet", tmp_path / "in", "--out", tmp_path / "set")
    assert run(capsys, *arguments)[0] == 0
    edited = tmp_path / "set/masks/case0001/001.png"
    edited.write_bytes(b"edited")
    (tmp_path / "set/masks/case0001/002.png").unlink()  # so that the case would be made again
    code, _, error = run(capsys, *arguments)
    assert code == 2 and one_line_of(error) and str(edited) in error and edited.read_bytes() == b"edited"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    for out in ("other", "in", "in/.."):
        code, _, error = run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / out)
        assert code == 2 and one_line_of(error), out


def test_without_lists_or_volumes(tmp_path, capsys, monkeypatch):
    write(tmp_path / "in", lists=".")
    for name in ("train.txt", "test_vol.txt"):
        (tmp_path / "in" / name).unlink()
    code, said, _ = run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / "all")
    assert code == 0 and said.count("nor in lists/lists_Synapse") == 2 and "train 9 slices" in said
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)  # importing it fails
    code, _, error = run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / "none")
    assert code == 2 and one_line_of(error) and "pip install h5py" in error
    assert not (tmp_path / "none").exists()
    (tmp_path / "in/test_vol_h5/case0001.npy.h5").unlink()
    code, said, _ = run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / "train")
    assert code == 0 and "no test.txt" in said and not (tmp_path / "train/test.txt").exists()


def test_values_that_are_no_whole_hu_are_said(tmp_path, capsys):
    content = scans()
    content["case0006"] = content["case0006"][0] + 0.3, content["case0006"][1]
    write(tmp_path / "in", content=content)
    code, said, _ = run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / "set")
    assert code == 0 and "warning: case0006 (1 of 3 cases)" in said and "no whole HU" in said


def test_columns_first(tmp_path, capsys):
    """What np.savez makes of slices of a volume that lies in memory as NIfTI does."""
    content = write(tmp_path / "in")
    hu, labels = content["case0005"]
    arrays = {"image": np.asfortranarray(in_unit(hu[0])), "label": np.asfortranarray(labels[0])}
    np.savez_compressed(tmp_path / "in/train_npz/case0005_slice000.npz", **arrays)
    assert run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / "set")[0] == 0
    assert (images_of(tmp_path / "set")["case0005/000.png"] == hu[0].clip(-125, 275).astype(int) + 1024).all()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bad_slices(folder):
    """{name: arrays of an .npz}"""
    image, label = np.zeros((20, 24), np.float32), np.zeros((20, 24), np.uint8)
    trap = np.empty((20, 24), object)
    trap[:] = Trap(folder / "sprung")
    return {
        "no label": {"image": image},
        "no image": {"label": label},
        "HU": {"image": image - 1000, "label": label},
        "8 bits": {"image": label, "label": label},
        "above": {"image": image + 1.01, "label": label},
        "below": {"image": image - 0.01, "label": label},
        "NaN": {"image": image * np.nan, "label": label},
        "infinite": {"image": image + np.inf, "label": label},
        "half a label": {"image": image, "label": image + 0.5},
        "negative": {"image": image, "label": image - 1},
        "too large": {"image": image, "label": image + 255},
        "NaN label": {"image": image, "label": image * np.nan},
        "volume": {"image": image[None], "label": label[None]},
        "other size": {"image": image, "label": label[1:]},
        "other case": {"image": image[1:], "label": label[1:]},
        "empty": {"image": image[:0], "label": label[:0]},
        "text": {"image": image, "label": label.astype("U1")},
        "complex": {"image": image.astype("c8"), "label": label},
        "pickled": {"image": image, "label": trap},
        "all pickled": {"image": trap, "label": trap},
    }


def test_slices_that_cannot_be_used_are_one_line(tmp_path, capsys):
    write(tmp_path / "in")
    path = tmp_path / "in/train_npz/case0005_slice001.npz"
    arguments = ("transunet", tmp_path / "in", "--out", tmp_path / "set")
    for name, arrays in bad_slices(tmp_path).items():
        np.savez(path, **arrays)
        code, _, error = run(capsys, *arguments)
        assert code == 2 and one_line_of(error) and "case0005_slice00" in error, (name, error)
        assert not (tmp_path / "set/train.txt").exists(), name
    for content in (b"", b"text", pickle.dumps(Trap(tmp_path / "sprung")), path.read_bytes()[:-30]):
        path.write_bytes(content)
        code, _, error = run(capsys, *arguments)
        assert code == 2 and one_line_of(error) and path.name in error
    assert not (tmp_path / "sprung").exists()


def bad_volumes(secret):
    """{name: what is written into a new file}"""
    image, label = np.zeros((3, 20, 24), np.float32), np.ones((3, 20, 24), np.uint8)

    def arrays(file, **changed):
        for name, array in ({"image": image, "label": label} | changed).items():
            if array is not None:
                file[name] = array

    def unwritten(file):
        arrays(file, label=None)
        file.create_dataset("label", (3, 20, 24), "u1", chunks=(1, 20, 24))

    def virtual(file):
        layout = h5py.VirtualLayout((3, 20, 24), "f4")
        layout[:] = h5py.VirtualSource(str(secret), "image", (3, 20, 24))
        arrays(file, image=None)
        file.create_virtual_dataset("image", layout)

    def outside(file):
        arrays(file, image=None)
        file.create_dataset("image", (3, 20, 24), "f4", external=[(str(secret), 0, 5760)])

    def huge(file):
        for name in ("image", "label"):
            file.create_dataset(name, (10**9, 10**6, 10**6), "f4", chunks=(1, 8, 8))

    return {
        "no label": lambda file: arrays(file, label=None),
        "values": lambda file: arrays(file, image=image + 2),
        "labels": lambda file: arrays(file, label=label + 254),
        "shapes": lambda file: arrays(file, label=label[:2]),
        "flat": lambda file: arrays(file, image=image[0], label=label[0]),
        "text": lambda file: arrays(file, label="liver"),
        "group": lambda file: (arrays(file, image=None), file.create_group("image")),
        "type": lambda file: arrays(file, image=np.dtype("f4")),
        "link": lambda file: arrays(file, image=h5py.ExternalLink(str(secret), "image")),
        "soft link": lambda file: arrays(file, image=h5py.SoftLink("/label")),
        "virtual": virtual,
        "outside": outside,
        "unwritten": unwritten,
        "huge": huge,
    }


def test_volumes_that_cannot_be_used_are_one_line(tmp_path, capsys):
    write(tmp_path / "in")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["image"] = np.zeros((3, 20, 24), np.float32)
    path = tmp_path / "in/test_vol_h5/case0001.npy.h5"
    arguments = ("transunet", tmp_path / "in", "--out", tmp_path / "set")
    for name, fill in bad_volumes(tmp_path / "secret.h5").items():
        with h5py.File(path, "w") as file:
            fill(file)
        code, _, error = run(capsys, *arguments)
        assert code == 2 and one_line_of(error) and "case0001.npy.h5" in error, (name, error)
        assert not (tmp_path / "set/train.txt").exists(), name


def test_lists_and_folders_that_cannot_be_used_are_one_line(tmp_path, capsys):
    write(tmp_path / "in", lists=".")
    arguments = ("transunet", tmp_path / "in", "--out", tmp_path / "set")
    wrong = {
        "train.txt": ("case0005_slice009", "case0005", "../in/case0005_slice000", "/etc/passwd", "\x00", ""),
        "test_vol.txt": ("case0002", "case0001_slice000/", "..", "case0005\n"),
    }
    for name, texts in wrong.items():
        path = tmp_path / "in" / name
        before = path.read_text()
        for text in texts:
            path.write_text(text)
            code, _, error = run(capsys, *arguments)
            assert code == 2 and one_line_of(error), (name, text, error)
            assert not (tmp_path / "set").exists(), (name, text)
        path.write_text(before)
    volume = tmp_path / "in/test_vol_h5/case0001.npy.h5"
    volume.rename(volume.with_name("case0005.npy.h5"))
    (tmp_path / "in/test_vol.txt").write_text("case0005\n")
    code, _, error = run(capsys, *arguments)
    assert code == 2 and "case0005 is for training and for testing" in error
    for folder in ("none", "in/train_npz"):
        code, _, error = run(capsys, "transunet", tmp_path / folder, "--out", tmp_path / "set")
        assert code == 2 and one_line_of(error)


@pytest.mark.parametrize("name", ("train_npz/case0005_slice001.npz", "test_vol_h5/case0001.npy.h5"))
def test_damaged_files(tmp_path, capsys, name):
    """100 seeded mutations each: a set, or one line."""
    write(tmp_path / "in")
    path = tmp_path / "in" / name
    sound = path.read_bytes()
    refused = 0
    for seed in range(100):
        rng = random.Random(seed)
        path.write_bytes(sound)
        rng.choice((flip_bits, flip_bits, cut_short, overwrite))(rng, path, None)
        code, _, error = run(capsys, "transunet", tmp_path / "in", "--out", tmp_path / "set")
        assert code == 0 or (code == 2 and one_line_of(error)), (seed, error)
        refused += code == 2
    assert refused > 30


def test_a_damaged_record_is_named(tmp_path, capsys):
    write(tmp_path / "in")
    arguments = ("transunet", tmp_path / "in", "--out", tmp_path / "set")
    assert run(capsys, *arguments)[0] == 0
    about = tmp_path / "set/transunet/case0001.json"
    assert json.loads(about.read_text())["slices"] == ["000.png", "001.png", "002.png"]
    about.write_text("{")
    code, _, error = run(capsys, *arguments)
    assert code == 2 and one_line_of(error) and "case0001.json" in error
