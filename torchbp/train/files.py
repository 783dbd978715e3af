"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` to a temporary name in the same folder, sync it, and rename it to `path`.

    A reader, or a machine that loses power, sees the old file or the new one, never a part of one.
    Text is written as UTF-8.

    Raises:
        OSError: the folder is missing or cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(Path(folder) / "note.txt", "loss 0.5")
        ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
        [('note.txt', 'loss 0.5')]
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something went wrong
