"""Writing a file: the old content or the new, whatever fails."""

import os
import stat
import threading
import time

import pytest
import torch

import dtrain
from dtrain import Dare, InputError
from dtrain.artifact import atomic
from dtrain.artifact.atomic import SUFFIX, write_atomic

CHUNKS = [b"new ", memoryview(b"content"), b""]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path):
    (tmp_path / "delta").write_bytes(b"old")
    return tmp_path / "delta"


@pytest.mark.parametrize("name", ["delta", "with space", "größe", "a*b[c]?", ".hidden"])
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_writes(tmp_path, name, kind):
    for _ in range(2):
        assert write_atomic(kind(tmp_path / name), CHUNKS) == 11
        assert (tmp_path / name).read_bytes() == b"new content"
    assert names(tmp_path) == [name]


def fail_at(monkeypatch, owner, name, number, error):
    original, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["disk full", "interrupt"])
@pytest.mark.parametrize("step", ["open", "fdopen", "fsync", "replace"])
def test_the_old_file_survives_any_failure(path, monkeypatch, step, error):
    with monkeypatch.context() as patch:
        fail_at(patch, type(path) if step == "replace" else os, step, 1, error)
        kind, message = (InputError, "cannot be written .No space") if error is FULL else (KeyboardInterrupt, None)
        with pytest.raises(kind, match=message):
            write_atomic(path, CHUNKS)
    assert path.read_bytes() == b"old"
    assert names(path.parent) == ["delta"]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError("from the source")], ids=repr)
def test_the_old_file_survives_a_failing_write(path, error):
    def chunks():
        yield b"half of it"
        raise error

    with pytest.raises(InputError if error is FULL else type(error)):
        write_atomic(path, chunks())
    assert path.read_bytes() == b"old"
    assert names(path.parent) == ["delta"]


def test_a_message_after_the_rename_does_not_deny_it(path, monkeypatch):
    """Some file systems cannot sync a folder: by then the new file is in place."""
    fail_at(monkeypatch, os, "fsync", 2, OSError(22, "Invalid argument"))
    try:
        write_atomic(path, CHUNKS)
    except InputError as error:
        assert "Nothing was changed" not in str(error)  # noqa: PT017
    assert path.read_bytes() == b"new content"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomic(path, CHUNKS)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"none/delta cannot be written .No such file or directory.*give a path"):
        write_atomic(tmp_path / "none" / "delta", CHUNKS)


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(InputError, match="folder cannot be written"):
        write_atomic(tmp_path / "folder", CHUNKS)
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_at_the_temporary_name_is_not_followed(path, monkeypatch, dangling):
    victim = path.parent / "victim"
    if not dangling:
        victim.write_bytes(b"precious")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "00000000")
    (path.parent / f".delta.00000000{SUFFIX}").symlink_to(victim)
    with pytest.raises(InputError, match="File exists"):
        write_atomic(path, CHUNKS)
    assert path.read_bytes() == b"old"
    assert not victim.exists() if dangling else victim.read_bytes() == b"precious"


def test_stale_temporaries_are_removed_and_fresh_ones_are_not(path):
    stale, fresh, other = (path.parent / f".{name}{SUFFIX}" for name in ("delta.1", "delta.2", "other.1"))
    for file in (stale, fresh, other):
        file.write_bytes(b"half")
    for file in (stale, other):
        os.utime(file, (time.time() - 90_000,) * 2)
    write_atomic(path, CHUNKS)
    assert names(path.parent) == [fresh.name, other.name, "delta"]


def test_the_last_of_several_writers_wins_whole(path):
    contents = [bytes([i]) * 100_000 for i in range(4)]
    threads = [threading.Thread(target=write_atomic, args=(path, [c[:50_000], c[50_000:]])) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert names(path.parent) == ["delta"]


def test_a_delta_can_be_saved_over_the_file_it_came_from(tmp_path):
    base = {"w": torch.randn(20, 20)}
    dtrain.compress(base, {"w": torch.randn(20, 20)}, Dare(keep=0.5)).save(tmp_path / "delta")
    before = (tmp_path / "delta").read_bytes()
    dtrain.load(tmp_path / "delta").save(tmp_path / "delta")
    assert (tmp_path / "delta").read_bytes() == before
