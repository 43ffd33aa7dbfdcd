"""Write a file so that its path holds the old content or the new, never half of either."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

from dtrain.errors import InputError

SUFFIX = ".dtrain-tmp"
_STALE_SECONDS = 24 * 3600  # no writer takes a day: an older temporary belongs to a process that was killed


def write_atomic(path: str | Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write `chunks` to `path` through a temporary file in the same folder, synced before it is renamed.

    Args:
        path: Where the file goes. Its mode follows the umask, as that of any new file.
        chunks: The content.

    Returns:
        Bytes written.

    Raises:
        InputError: If the file cannot be written. What was at `path` is still there.
    """
    path = Path(path)
    if not path.name:
        raise InputError(f"{path} is a folder. Give the path of a file in it.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    written = 0
    try:
        _remove_stale(path)
        # O_EXCL refuses an existing file and any link that somebody planted under the temporary's name.
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                for chunk in chunks:
                    written += file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # not every file system can; the new file is in place already
            _sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}). Nothing was changed; give a path you may write to."
        ) from error
    return written


def _remove_stale(path: Path) -> None:
    for other in path.parent.glob(f".{_escape(path.name)}.*{SUFFIX}"):
        with contextlib.suppress(OSError):  # somebody else may clean up at the same time
            if time.time() - other.lstat().st_mtime > _STALE_SECONDS:
                other.unlink()


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows renames without a folder to sync
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
