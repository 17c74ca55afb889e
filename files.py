"""Files that appear under their name whole, or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that nobody ever sees a part of it."""
    with written_whole(path) as file:
        file.write(text.encode())


@contextmanager
def written_whole(path: Path, sync: bool = True):
    """A binary file to write to, which appears under its name, `sync`ed to disk, when all went well.

    Raises OSError, on a full disk for example; nothing is left then of what was written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # as torch.save does
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
        raise
