"""ct/listing.py: which files are in a folder."""

import random

import pytest
from handmade import put

from ct.layout import all_slices, find_slices, read_list
from ct.listing import VOLUMES, files_below, natural_order, slices_below, without_masks
from ct.slices import SUFFIXES, DataError


def test_natural_order():
    names = ["a/1.png", "a/2.png", "a/10.png", "a1/1.png", "a10/1.png", "b0.png", "b1.png"]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=natural_order) == names
    assert sorted(["img", "1", "", "a1b", "a1"], key=natural_order) == ["", "1", "a1", "a1b", "img"]


def test_any_case_of_suffix_links_and_hidden_files(tmp_path):
    root = tmp_path / "set"
    for name in ("a/0.PNG", "a/10.npy", "a/9.Png", "a/._0.png", ".cache/0.png", "a/notes.txt", "b.NII.GZ"):
        put(root / name, b"x")
    put(tmp_path / "elsewhere/3.png", b"x")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a/up").symlink_to(root)  # leads back
    (root / "a/11.png").symlink_to(tmp_path / "elsewhere/3.png")
    expected = ["a/0.PNG", "a/9.Png", "a/10.npy", "a/11.png", "linked/3.png"]
    assert files_below(root, SUFFIXES) == all_slices(root) == expected
    assert files_below(root, VOLUMES) == files_below(root, VOLUMES, deep=False) == ["b.NII.GZ"]
    assert [path.relative_to(root).as_posix() for path in slices_below(root)] == expected
    assert slices_below(root / "a/0.PNG") == [root / "a/0.PNG"] and slices_below(root / "a/notes.txt") == []
    with pytest.raises(DataError, match="no such file or folder"):
        slices_below(root / "missing")


def test_a_list_finds_files_whatever_the_case_of_their_suffix(tmp_path):
    for name in ("a/0.PNG", "a/1.png", "a/2.NPY", "A/0.png"):
        put(tmp_path / name, b"x")
    names = ["a/0.png", "a/0", "a/1.PNG", "a/2", "A/0.PNG", "a/3.png"]
    assert find_slices(tmp_path, names) == ["a/0.PNG", "a/0.PNG", "a/1.png", "a/2.NPY", "A/0.png", None]


def test_names_with_spaces_are_found_whole_or_without_their_last_column(tmp_path):
    for name in ("patient 1/slice 3.png", "patient 1/slice.png", "b/1.png"):
        put(tmp_path / "images" / name, b"x")
    (tmp_path / "list.txt").write_text("patient 1/slice 3\npatient 1/slice 7\nb/1 liver\n")
    found = find_slices(tmp_path / "images", read_list(tmp_path / "list.txt"))
    assert found == ["patient 1/slice 3.png", "patient 1/slice.png", "b/1.png"]


@pytest.mark.parametrize("encoding", ("utf-8-sig", "utf-16", "utf-16-le"))
def test_lists_as_editors_save_them(tmp_path, encoding):
    text = "a/1.png\r\nfall_ä/2.png\r\n"
    (tmp_path / "list.txt").write_bytes(("\ufeff" * (encoding == "utf-16-le") + text).encode(encoding))
    assert read_list(tmp_path / "list.txt") == ["a/1.png", "fall_ä/2.png"]


def test_absolute_paths_inside_the_folder_are_accepted(tmp_path):
    for name in ("a/1.png", "a/2.png"):
        put(tmp_path / "images" / name, b"x")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/images/a/1.png 3\nimages/a/2.png\n")
    found = find_slices(tmp_path / "images", read_list(tmp_path / "list.txt", tmp_path / "images"))
    assert found == ["a/1.png", "a/2.png"]
    (tmp_path / "link").symlink_to(tmp_path / "images")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/images/a/1.png\n{tmp_path}/link/a/2.png\n")
    assert read_list(tmp_path / "list.txt", tmp_path / "images") == ["a/1.png", "a/2.png"]
    (tmp_path / "list.txt").write_text("/etc/passwd\n")
    with pytest.raises(DataError, match="leaves the data root"):
        read_list(tmp_path / "list.txt", tmp_path / "images")
    outside = tmp_path / "set/img_dir/train"
    put(outside / "b/3.png", b"x")
    names = ["img_dir/train/b/3.png", "train/b/3", f"{tmp_path.name}/set/img_dir/train/b/3.png 7", "test/b/3"]
    assert find_slices(outside, names) == ["b/3.png"] * 3 + [None]


def test_two_links_to_one_folder_are_two_cases_in_any_order(tmp_path):
    put(tmp_path / "elsewhere/1.png", b"x")
    for case in ("b", "a"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / case).symlink_to(tmp_path / "elsewhere")
    assert all_slices(tmp_path / "images") == ["a/1.png", "b/1.png"]
    (tmp_path / "elsewhere/back").symlink_to(tmp_path)  # images/a/back/elsewhere, .../images: both lie above
    assert {"a/1.png", "b/1.png"} <= {*all_slices(tmp_path / "images")}


def test_masks_are_known_by_their_names(tmp_path):
    images = ["a/1.png", "mask_patients/1.png", "KiTS/case/imaging.nii.gz", "b/lone_seg.nii.gz"]
    images += ["b/x_0000.nii.gz", "b/y.PNG", "b/p1_ct.nii", "b/volume-0.nii", "b/gt_2.png", "q/q_scan.nii"]
    masks = [
        "masks/a/1.png",
        "b/x_seg.nii.gz",
        "b/y-label.png",
        "b/p1_seg.nii",
        "b/segmentation-0.nii",
        "labelsTr/1.nii.gz",
        "KiTS/case/segmentation.NII.gz",
        "KiTS/case/mask_v2.nii.gz",
        "q/gt.nii",
        "labelsVa/1.nii.gz",
        "gt/train/1.png",
    ]
    paths = [tmp_path / name for name in images + masks]
    assert without_masks(paths, tmp_path, "gt/{split}") == paths[: len(images)]
    assert without_masks(paths, tmp_path, "{split}/masks") == paths[: len(images)] + paths[-1:]
