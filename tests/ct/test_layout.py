"""ct/layout.py: lists as other people write them, where slices lie, what stands beside them."""

import pytest
from handmade import put

from ct.layout import case_of, find_slices, read_list
from ct.slices import DataError


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
    expected = ["a/1.png", "a/2.PNG", "b/img0001_slice003", "c 1/x y.npy", "d/4 liver", "e/5.png", "f 2/6"]
    assert read_list(path) == expected


def test_bad_lists(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
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
