"""Arrays on disk as compressed slices, each with a checksum: read a few of three hundred, trust what is read.

    file     slice 0, slice 1, … one after the other, each compressed by itself
    record   shape, dtype, and where each slice begins and its CRC-32; kept by the caller (JSON)

Codec: Blosc's LZ4, level 5, after shuffling the bytes, through numcodecs. Neighbouring voxels share their exponents,
so shuffled bytes compress where plain ones do not. Measured on preprocessed CT, on one core: size ÷ 1.56, writing
1.0 GB/s, reading 2.3 to 3.0 GB/s; Zstandard 1 gives ÷ 1.75 at 0.4 and 0.55 GB/s.

Files are opened, read and closed: nothing stays mapped, which Windows would not let be replaced, and nothing is
read ahead of a slice, which cost thirty times its size through a memory map.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc

_CODEC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE)


class DamagedFile(Exception):
    """A stored array is not what its writer left; the message says why."""


def write_slices(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write (…, z, y, x), one chunk per z; returns the record that :class:`StoredArray` needs."""
    begins, sums, position = [0], [], 0
    with path.open("wb") as file:
        for z in range(array.shape[-3]):
            chunk = _CODEC.encode(np.ascontiguousarray(array[..., z, :, :]))
            file.write(chunk)
            position += len(chunk)
            begins.append(position)
            sums.append(zlib.crc32(chunk))
    return {"shape": list(array.shape), "dtype": array.dtype.str, "begins": begins, "crc32": sums}


class StoredArray:
    """A read-only array (…, z, y, x) of :func:`write_slices`. Reading raises :class:`DamagedFile`."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        """Raises DamagedFile for a file of another size than recorded; the content is checked as it is read."""
        self.path = path
        self.shape = tuple(record["shape"])
        self.dtype = np.dtype(record["dtype"])
        self._begins, self._sums = record["begins"], record["crc32"]
        size = path.stat().st_size
        if size != self._begins[-1] or len(self._begins) != self.shape[-3] + 1 or len(self._sums) != self.shape[-3]:
            raise DamagedFile(f"{path.name} has {size} bytes, expected {self._begins[-1]}")

    def planes(self, first: int, last: int) -> np.ndarray:
        """Slices ``first`` to ``last - 1``: (…, last - first, y, x)."""
        plane = (*self.shape[:-3], *self.shape[-2:])
        out = np.empty((*self.shape[:-3], last - first, *self.shape[-2:]), self.dtype)
        begin, end = self._begins[first], self._begins[last]
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            block = file.read(end - begin)
        for z in range(first, last):
            chunk = block[self._begins[z] - begin : self._begins[z + 1] - begin]
            if zlib.crc32(chunk) != self._sums[z]:
                raise DamagedFile(f"slice {z} of {self.path.name} changed")
            out[..., z - first, :, :] = np.frombuffer(_CODEC.decode(chunk), self.dtype).reshape(plane)
        return out
