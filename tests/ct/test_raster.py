"""ct/raster.py: slices and masks as Pillow writes them for other programs, in every format and mode."""

import io

import numpy as np
import pytest
from handmade import one_line_of, put, random_set, run
from PIL import Image

from ct.properties import Reading
from ct.raster import JPEG_ROUNDING, MAX_SIDE
from ct.slices import DataError, mask_mapping, read_mask, read_slice, read_stored, slice_header
from data import SegmentationDataset, SliceDataset

GREY = np.random.default_rng(0).integers(0, 256, (24, 20)).astype(np.uint8)
DEEP = np.random.default_rng(1).integers(0, 2**16, (24, 20)).astype(np.uint16)
SMOOTH = np.linspace(0, 255, 24 * 20).reshape(24, 20).astype(np.uint8)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ("png", "tif", "bmp"))
@pytest.mark.parametrize("mode", ("L", "RGB", "RGBA", "P", "LA"))
def test_grey_is_read_exactly_however_it_is_stored(tmp_path, suffix, mode):
    if (suffix, mode) == ("bmp", "LA"):
        pytest.skip("there is no such BMP")
    path = save(tmp_path / f"a.{suffix}", GREY, mode)
    assert slice_header(path) == ((24, 20), "uint8")
    assert np.array_equal(read_slice(path), GREY)


@pytest.mark.parametrize("compression", (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"))
def test_16_bit_tiff_is_hu_minus_the_offset(tmp_path, compression):
    path = save(tmp_path / "a.TIFF", DEEP, compression=compression)
    values, stored = read_stored(path)
    assert stored == "hu" and np.array_equal(values, DEEP.astype(int) - 1024)
    swapped = save(tmp_path / "b.tif", DEEP.astype(">u2"))
    assert np.array_equal(read_slice(swapped, 0), DEEP)
    assert Reading("stored", 0).header(path) == ((24, 20), "stored")


@pytest.mark.parametrize("mode", ("L", "RGB"))
@pytest.mark.parametrize("quality", (100, 75, 20))
def test_jpeg_is_near_to_what_was_saved(tmp_path, mode, quality):
    path = save(tmp_path / "a.jpeg", SMOOTH, mode, quality=quality)
    values, stored = read_stored(path)
    assert stored == "uint8" and np.abs(values - SMOOTH).max() < 24
    with Image.open(path) as image:
        assert np.array_equal(values, np.array(image.convert("L")))  # Pillow's own grey


def test_jpeg_that_was_saved_again_with_a_tint_of_rounding_is_grey(tmp_path):
    """One level of each chroma, as another program's rounding leaves it; three levels are a tint."""
    for level, grey in ((1, True), (3, False)):
        chroma = np.full_like(SMOOTH, 128 + level)
        channels = np.stack([SMOOTH, chroma, chroma], -1)
        path = tmp_path / f"{level}.jpg"
        Image.fromarray(channels, mode="YCbCr").save(path, quality=100)
        if grey:
            assert np.abs(read_slice(path) - SMOOTH).max() <= JPEG_ROUNDING
        else:
            with pytest.raises(DataError, match="in colour"):
                read_slice(path)


def test_a_picture_is_what_its_content_is_not_its_suffix(tmp_path):
    path = put(tmp_path / "a.png", save(tmp_path / "b.jpg", GREY).read_bytes())
    assert np.array_equal(read_slice(path), read_slice(tmp_path / "b.jpg"))
    with pytest.raises(DataError, match="a JPEG is lossy"):
        read_mask(path)


def bad_pictures():
    def picture(image, **options):
        file = io.BytesIO()
        image.save(file, **options)
        return file.getvalue()

    grey, red = Image.fromarray(GREY), GREY[..., None].repeat(3, 2)
    red[5:9, 7:12] = (255, 0, 0)
    red = Image.fromarray(red)
    turned, clear = Image.Exif(), Image.fromarray(np.dstack([GREY * 0] * 3 + [GREY]), mode="RGBA")
    turned[274] = 6
    photometric = b"\x06\x01\x03\0\1\0\0\0"  # a tag, its type and count
    jpeg, tiff, bmp = (picture(grey, format=format) for format in ("JPEG", "TIFF", "BMP"))
    deep = picture(Image.fromarray(DEEP), format="TIFF")
    large = bmp[:18] + (60000).to_bytes(4, "little") * 2 + bmp[26:]
    return {
        "a.bmp": (picture(red, format="BMP"), "in colour, such as (255, 0, 0) in row 5, column 7"),
        "b.jpg": (picture(red, format="JPEG"), "in colour"),
        "c.jpg": (picture(grey.convert("CMYK"), format="JPEG"), "8-bit CMYK JPEG"),
        "d.tif": (picture(grey.convert("CMYK"), format="TIFF"), "8-bit CMYK TIFF"),
        "e.tif": (picture(Image.fromarray(GREY.astype(np.float32)), format="TIFF"), "32-bit float TIFF"),
        "f.tif": (picture(Image.fromarray(GREY.astype(np.int32)), format="TIFF"), "32-bit signed TIFF"),
        "g.tif": (picture(grey, format="TIFF", save_all=True, append_images=[grey]), "several pages"),
        "h.jpg": (picture(grey, format="JPEG", exif=turned), "EXIF orientation"),
        "i.tif": (picture(grey, format="TIFF", tiffinfo={274: 3}), "EXIF orientation"),
        "i.png": (picture(grey, format="PNG", exif=turned), "EXIF orientation"),
        "j.tif": (deep.replace(photometric + b"\1", photometric + b"\0"), "white is zero"),
        "k.bmp": (picture(Image.fromarray(GREY > 9), format="BMP"), "1-bit grey BMP"),
        "l.png": (picture(clear, format="PNG"), "transparent in places"),
        "m.jpg": (jpeg[: len(jpeg) // 2], "damaged JPEG"),
        "n.tif": (tiff[:100], "damaged"),
        "o.bmp": (bmp[: len(bmp) // 2], "damaged BMP"),
        "p.bmp": (large, "can be read"),
        "q.jpg": (b"\xff\xd8\xffnonsense", "damaged JPEG"),
        "r.jpg": (b"GIF89a", "not a PNG, JPEG, TIFF or BMP"),
    }


@pytest.mark.parametrize("name", bad_pictures())
def test_what_is_no_grey_picture_is_one_line(tmp_path, name):
    content, reason = bad_pictures()[name]
    path = put(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read_slice(path)
    assert str(path) in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


def test_a_header_that_claims_much_is_refused_before_memory_is_taken(tmp_path):
    bmp = save(tmp_path / "a.bmp", GREY).read_bytes()
    size = MAX_SIDE.to_bytes(4, "little")
    with pytest.raises(DataError, match="too short"):
        read_slice(put(tmp_path / "b.bmp", bmp[:18] + size * 2 + bmp[26:]))


@pytest.mark.parametrize("suffix", ("tif", "bmp"))
def test_masks_are_exact_in_tiff_and_bmp_and_refused_in_jpeg(tmp_path, suffix):
    labels = (GREY % 14).astype(np.uint8)
    assert np.array_equal(read_mask(save(tmp_path / f"a.{suffix}", labels)), labels)
    indexed = Image.fromarray(labels)
    indexed.putpalette([index * 37 % 256 for index in range(768)])
    indexed.save(tmp_path / f"b.{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"b.{suffix}"), labels)
    red = np.where(labels[..., None] > 6, [255, 0, 0], 0).astype(np.uint8)
    coloured = save(tmp_path / f"c.{suffix}", red)
    assert np.array_equal(read_mask(coloured, mask_mapping({"255,0,0": 3, "0,0,0": 0})), 3 * (labels > 6))
    for lossy in (save(tmp_path / "a.jpg", labels), save(tmp_path / "d.tif", labels, compression="jpeg")):
        with pytest.raises(DataError, match="lossy"):
            read_mask(lossy)


def test_a_set_of_tiff_slices_with_bmp_masks_is_the_set_of_png(tmp_path, capsys):
    names = random_set(tmp_path / "png")
    for name in names:
        stem = name.removesuffix(".png")
        with Image.open(tmp_path / "png/images" / name) as image:
            save(tmp_path / f"tif/images/{stem}.tif", np.array(image))
        with Image.open(tmp_path / "png/masks" / name) as mask:
            save(tmp_path / f"tif/masks/{stem}.bmp", np.array(mask))
    (tmp_path / "tif/train.txt").write_text("\n".join(name.removesuffix(".png") for name in names))
    (tmp_path / "tif/two.txt").write_text("a/00.tif 1\na/01.TIF 0\n")
    pairs = [SegmentationDataset(tmp_path / root, "train.txt", num_classes=4) for root in ("png", "tif")]
    assert pairs[0].cases == pairs[1].cases and pairs[1].kind == "hu"
    for (image, mask), (other, other_mask) in zip(*pairs):
        assert np.array_equal(image, other) and np.array_equal(mask, other_mask)
    assert SliceDataset(tmp_path / "tif", "two.txt").names == ["a/00.tif", "a/01.tif"]
    assert SliceDataset(tmp_path / "tif", None).names == pairs[1].names

    for root in ("png", "tif"):
        code, out, err = run(capsys, "check", "--root", tmp_path / root)
        assert code == 0 and err == "" and "9 files read, 0 bad" in out and "with masks" in out
        assert "1  class 1" in out  # masks were found
        packed = ("--list", "train.txt", "--out", tmp_path / f"{root}.p")
        assert run(capsys, "pack", "--root", tmp_path / root, *packed)[0] == 0
        page = ("--list", "train.txt", "--out", tmp_path / f"{root}.page.png")
        assert run(capsys, "show", "--root", tmp_path / root, *page)[0] == 0
    assert (tmp_path / "png.p.npy").read_bytes() == (tmp_path / "tif.p.npy").read_bytes()
    save(tmp_path / "tif/masks/a/00.jpg", GREY)
    (tmp_path / "tif/masks/a/00.bmp").unlink()
    code, out, err = run(capsys, "check", "--root", tmp_path / "tif")
    assert code == 1 and "bad: " in out and "a/00.jpg: a JPEG is lossy" in out


def test_a_jpeg_among_slices_of_hu_is_said(tmp_path, capsys):
    random_set(tmp_path)
    save(tmp_path / "images/a/00.jpg", GREY)
    (tmp_path / "images/a/00.png").unlink()
    (tmp_path / "train.txt").write_text("a/00\na/01\na/02\n")
    command = ("pack", "--root", tmp_path, "--list", "train.txt", "--out", tmp_path / "p")
    code, _, err = run(capsys, *command)
    assert code == 2 and one_line_of(err) and "a/00.jpg: 8-bit values, but the set has HU" in err
