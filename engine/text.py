"""Text as people's editors save it."""

import codecs
from pathlib import Path


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises OSError, and ValueError, whose message does not name the file, for what is no such text.
    """
    data = Path(path).read_bytes()
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not a text in UTF-8 or UTF-16: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise ValueError("not a text in UTF-8 or UTF-16: it holds a null character")
    return text.replace("\r\n", "\n").replace("\r", "\n")
