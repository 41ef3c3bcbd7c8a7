"""A local file system for Ray that writes as `write_atomic` does.

Tune writes its records in place: a full disk or a kill leaves half of them, and a sweep whose records cannot be read
would begin again.
"""

from __future__ import annotations

import io
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pyarrow import PythonFile
from pyarrow.fs import FSSpecHandler, PyFileSystem

from pipeline import storage


class _WholeFile(io.BytesIO):
    """Held in memory until it is closed: for small files."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        """Write it. Raises `StorageFailed`, and leaves the file as it was."""
        if not self.closed:
            data = self.getvalue()
            super().close()
            storage.write_atomic(self._path, data)


class _Handler(FSSpecHandler):
    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        return PythonFile(_WholeFile(path), mode="w")


def whole_files() -> PyFileSystem:
    """This machine's files, each there wholly or not at all."""
    return PyFileSystem(_Handler(LocalFileSystem()))
