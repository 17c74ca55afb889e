"""Text as people's editors save it."""

import codecs
from pathlib import Path


def encoding_of(start: bytes) -> str:
    """By the first bytes of a file: UTF-8, with or without a byte order mark, or UTF-16 with one."""
    utf_16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if utf_16 else "utf-8-sig"


def read_text(path: str | Path) -> str:
    """The text of a file in one of these encodings.

    Raises OSError, and ValueError, whose message does not name the file, for what is no such text.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode(encoding_of(data))
    except UnicodeDecodeError as error:
        raise ValueError(f"not a text in UTF-8 or UTF-16: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise ValueError("not a text in UTF-8 or UTF-16: it holds a null character")
    return text.replace("\r\n", "\n").replace("\r", "\n")
