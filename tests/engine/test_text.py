"""engine/text.py: text files as editors and other systems save them."""

import pytest

from engine.text import read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_whatever_has_saved_it(tmp_path, encoding):
    path = tmp_path / "some.txt"
    path.write_bytes("Bauchraum Größe\r\n脾臓\n".encode(encoding))
    assert read_text(path) == "Bauchraum Größe\n脾臓\n"
    path.write_bytes("\ufeffx".encode("utf-16-be"))
    assert read_text(path) == "x"
    path.write_bytes(b"")
    assert read_text(path) == ""


@pytest.mark.parametrize(
    "data", [b"\xff", b"\xff\xfea", b"a\0b\0", b"\x89PNG\r\n\x1a\n\0", "é".encode("latin-1")]
)
def test_what_is_no_text(tmp_path, data):
    path = tmp_path / "some.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a text"):
        read_text(path)
