"""Promise 10: files others can open. Their mode follows the umask, any name will do, no other file is harmed."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dtrain
from dtrain import Dare, InputError
from dtrain.artifact import atomic
from dtrain.artifact.atomic import SUFFIX, write_atomic, write_folder
from dtrain.cli import main

CHUNKS = [b"new ", memoryview(b"content"), b""]
NAMES = ["delta", "with space", "größe", "日本語", "a*b[c]?", ".hidden", "-q", "new\nline", "x" * 255, "é" * 127]
KINDS = [str, Path]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path):
    (tmp_path / "delta").write_bytes(b"old")
    return tmp_path / "delta"


@pytest.fixture
def pair():
    base = {"w": torch.randn(4, 3)}
    return base, dtrain.compress(base, {"w": torch.randn(4, 3)}, Dare(keep=0.5))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:10]))
@pytest.mark.parametrize("kind", KINDS)
def test_any_name(tmp_path, name, kind):
    for _ in range(2):
        assert write_atomic(kind(tmp_path / name), CHUNKS) == 11
        assert (tmp_path / name).read_bytes() == b"new content"
    assert names(tmp_path) == [name]


def test_a_name_that_is_no_unicode(tmp_path):
    path = os.fsdecode(bytes(tmp_path) + b"/\xff\xfe")
    write_atomic(path, CHUNKS)
    assert os.listdir(bytes(tmp_path)) == [b"\xff\xfe"]  # noqa: PTH208  # names as bytes


@pytest.mark.parametrize("name", ["with space", "größe", "日本語"])
@pytest.mark.parametrize("kind", KINDS)
def test_deltas_and_bases_by_any_name(tmp_path, pair, name, kind):
    base, delta = pair
    folder = tmp_path / name
    folder.mkdir()
    delta.save(kind(folder / f"{name}.delta"))
    save_file(base, folder / f"{name}.safetensors")
    loaded = dtrain.load(kind(folder / f"{name}.delta"))
    loaded.verify(kind(folder / f"{name}.safetensors"))
    out = folder / f"{name} merged.safetensors"
    assert main(["apply", str(folder / f"{name}.safetensors"), str(folder / f"{name}.delta"), str(out)]) == 0
    assert torch.equal(load_file(out)["w"], loaded.state_dict(base)["w"])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(path, umask, mode):
    """That of a new file, whatever was there before."""
    path.chmod(0o400)
    before = os.umask(umask)
    try:
        write_atomic(path, CHUNKS)
        write_folder(path.parent / "folder", {"a": b"1"})
    finally:
        os.umask(before)
    modes = [
        stat.S_IMODE(place.stat().st_mode) for place in (path, path.parent / "folder" / "a", path.parent / "folder")
    ]
    assert modes == [mode, mode, 0o777 & ~umask]


def test_a_source_that_may_only_be_read(tmp_path, pair):
    """Nothing is written beside it, and nothing in it."""
    base, delta = pair
    delta.save(tmp_path / "delta")
    save_file(base, tmp_path / "base.safetensors")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    for file in (*tmp_path.iterdir(), tmp_path):
        file.chmod(0o500 if file.is_dir() else 0o400)
    try:
        loaded = dtrain.load(tmp_path / "delta")
        loaded.verify(tmp_path / "base.safetensors")
        state = loaded.state_dict(tmp_path / "base.safetensors")
    finally:
        tmp_path.chmod(0o700)
    state["w"].add_(1)  # what comes out is the caller's own
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("dangling", [True, False])
@pytest.mark.parametrize(
    "writer", [lambda path: write_atomic(path, CHUNKS), lambda path: write_folder(path, {"a": b""})]
)
def test_a_link_at_the_temporary_name_is_not_followed(path, monkeypatch, dangling, writer):
    target, victim = path.with_name("target"), path.with_name("victim")
    if not dangling:
        victim.write_bytes(b"precious")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "00000000")
    planted = path.with_name(f".target.00000000{SUFFIX}")
    planted.symlink_to(victim)
    with pytest.raises(InputError, match=r"target cannot be written \(File exists\)"):
        writer(target)
    assert planted.is_symlink()  # nor is it removed: it is not ours
    assert not target.exists()
    assert not victim.exists() if dangling else victim.read_bytes() == b"precious"


@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_at_the_path_is_replaced_and_its_target_left_alone(path, dangling):
    """As in the caches of the Hugging Face Hub, where links of several names go to one file."""
    target, link = path.with_name("blob"), path.with_name("link")
    if not dangling:
        target.write_bytes(b"precious")
    link.symlink_to(target)
    write_atomic(link, CHUNKS)
    assert not link.is_symlink()
    assert link.read_bytes() == b"new content"
    assert not target.exists() if dangling else target.read_bytes() == b"precious"


def test_another_name_of_the_file_keeps_the_old_content(path):
    other = path.with_name("other")
    os.link(path, other)
    write_atomic(path, CHUNKS)
    assert (path.read_bytes(), other.read_bytes()) == (b"new content", b"old")


def test_a_folder_that_is_a_link(path):
    (path.parent / "real").mkdir()
    link = path.with_name("link")
    link.symlink_to(path.parent / "real")
    write_atomic(link / "delta", CHUNKS)
    assert names(path.parent / "real") == ["delta"]
    assert link.is_symlink()


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(InputError, match=r"cannot be written: it is no regular file\. Give the path of a file"):
            write_atomic(special, CHUNKS)
        assert not special.is_file()
    assert names(tmp_path) == ["pipe"]


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for folder in (tmp_path / "folder", "/", "."):
        with pytest.raises(InputError, match=r"a folder\. Give the path of a file"):
            write_atomic(folder, CHUNKS)
    assert names(tmp_path) == ["folder"]
