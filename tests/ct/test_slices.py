"""ct/slices.py: readers on files that other writers made, and on damaged ones."""

import pickle

import numpy as np
import pytest
from handmade import png_bytes, put

from ct.slices import DataError, read_mask, read_slice


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
        "colour.png": (png_bytes(np.full((5, 5, 3), 7, np.uint16), color=2), "16-bit RGB PNG"),
        "palette.png": (png_bytes(gray, color=3, palette=range(48)), "in colour, such as (0, 1, 2)"),
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
