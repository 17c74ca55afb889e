"""Arrays of .npz files of others. Pickled objects are not read; whatever is damaged is a DataError."""

import math
import zipfile
from contextlib import contextmanager

import numpy as np

from ct.slices import DataError, check_side
from engine.config import one_line

AT_ONCE = 256  # rows read at a time
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextmanager
def opened(path, kind):
    """The file's Archive; DataError if it is none. kind: what it should be, for messages."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # damaged ones: many kinds
        raise DataError(f"{path}: not an .npz file, or damaged ({one_line(error)})") from None
    with archive:
        yield Archive(path, archive, kind)


class Archive:
    """The arrays of an .npz file. np.load would take all of an array: large published ones are larger than
    memory, and a damaged header claims what it likes."""

    def __init__(self, path, archive, kind):
        self.path, self.archive, self.kind = path, archive, kind

    def header(self, name):
        """Shape and dtype of an array that `blocks` can read."""
        with self.member(name) as (_, shape, dtype, by_columns):
            if by_columns and len(shape) > 1:
                raise DataError(f"{self.path}: {name}: in Fortran order; np.ascontiguousarray mends it")
            return shape, dtype

    def blocks(self, name):
        """Yields the rows of an array, at most AT_ONCE at a time."""
        with self.member(name) as (file, shape, dtype, _):
            row = math.prod(shape[1:]) * dtype.itemsize
            for start in range(0, shape[0], AT_ONCE):
                count = min(AT_ONCE, shape[0] - start)
                yield np.frombuffer(file.read(count * row), dtype).reshape(count, *shape[1:])

    def image(self, name):
        """A whole array (H, W) of numbers, in either order."""
        with self.member(name) as (file, shape, dtype, by_columns):
            if len(shape) != 2 or dtype.kind not in "iufb":
                raise DataError(f"{self.path}: {name}: {dtype} {shape}, where numbers (H, W) are expected")
            check_side(self.path, shape)
            values = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype)
            return values.reshape(shape, order="F" if by_columns else "C")

    @contextmanager
    def member(self, name):
        """The file of an array, after its header; shape, dtype, and whether it is in Fortran order."""
        if f"{name}.npy" not in self.archive.namelist():
            raise DataError(f"{self.path}: no {name} in it; is it {self.kind}?")
        try:
            with self.archive.open(f"{name}.npy") as file:
                shape, by_columns, dtype = HEADERS[np.lib.format.read_magic(file)](file)
                size = self.archive.getinfo(f"{name}.npy").file_size - file.tell()
                if not dtype.hasobject and size != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{size} bytes do not make {shape} of {dtype}")
                yield file, shape, dtype, by_columns
        except DataError:
            raise
        except Exception as error:  # zipfile, zlib, and ast in numpy's header: many kinds
            raise DataError(f"{self.path}: {name}: damaged ({one_line(error)})") from None
