"""Write a file so that its path holds the old content or the new, never half of either."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import stat
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dtrain.errors import InputError

SUFFIX = ".dtrain-tmp"
_STALE_SECONDS = 24 * 3600  # no writer takes a day: an older temporary belongs to a process that was killed
_STEM_BYTES = 200  # of a temporary's name are the file's own: with what is added, file systems take 255


def write_atomic(path: str | Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write `chunks` to `path` through a temporary file in the same folder, synced before it is renamed.

    Args:
        path: Where the file goes. Its mode follows the umask, as that of any new file. A symbolic link is replaced and
            not followed: what it points to may belong to somebody else, and stays as it is.
        chunks: The content.

    Returns:
        Bytes written.

    Raises:
        InputError: If the file cannot be written. What was at `path` is still there.
    """
    path = Path(path)
    if not path.name:
        raise InputError(f"{path} is a folder. Give the path of a file in it.")
    with _as_sentence(path):
        _refuse_special(path)
        temporary = _temporary(path)
        # Exclusive: an existing file is refused, and any link that somebody planted under the temporary's name.
        file = temporary.open("xb")
        try:
            written = _fill(file, chunks)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    return written


def write_folder(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write `files`, by name, as one new folder: all of them, or nothing.

    Args:
        folder: Where they go: a path that is free, or an empty folder.
        files: The content of every file.

    Raises:
        InputError: If the folder is taken or cannot be written.
    """
    folder = Path(folder).resolve()  # "." has no name to put another beside
    with _as_sentence(folder):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"{folder} is there already and not an empty folder. Remove it, or give another.")
        temporary = _temporary(folder)
        temporary.mkdir()
        try:
            for name, content in files.items():
                _fill((temporary / name).open("xb"), [content])
            _sync_folder(temporary)
            if os.name == "nt" and folder.exists():
                folder.rmdir()  # Windows renames onto nothing
            temporary.replace(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(folder.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        InputError: If it cannot be made.
    """
    with _as_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _fill(file: IO[bytes], chunks: Iterable[bytes | memoryview]) -> int:
    """Write a file, close it, and do not return before the disk has it."""
    with file:
        written = sum(map(file.write, chunks))
        file.flush()
        os.fsync(file.fileno())
    return written


@contextmanager
def _as_sentence(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}). Nothing was changed; give a path you may write to, "
            "on a disk with room."
        ) from error


def _refuse_special(path: Path) -> None:
    """Raise an InputError about a folder, and about a device or a pipe: renaming would take it from everybody."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise InputError(f"{path} cannot be written: it is {what}. Give the path of a file.")


def _temporary(path: Path) -> Path:
    """Return a new name beside `path`, once the temporaries of writers of it that were killed are removed."""
    stem = "." + os.fsdecode(os.fsencode(path.name)[:_STEM_BYTES])
    for other in path.parent.glob(f"{glob.escape(stem)}.*{SUFFIX}"):
        with suppress(OSError):  # somebody else may clean up at the same time
            status = other.lstat()
            if time.time() - status.st_mtime > _STALE_SECONDS:
                shutil.rmtree(other) if stat.S_ISDIR(status.st_mode) else other.unlink()
    return path.with_name(f"{stem}.{secrets.token_hex(4)}{SUFFIX}")


def _sync_folder(folder: Path) -> None:
    """Make the new name last. Not every file system can, and by now the new file is in place: no failure counts."""
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows renames without a folder to sync
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
