"""Promise 2: a path holds the old content or the new, never half of either, whatever fails and whenever."""

import json
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import dtrain
from dtrain import Dare, InputError, SeededSign
from dtrain.artifact.atomic import SUFFIX, make_folder, write_atomic, write_folder
from dtrain.cli import commands
from dtrain.weights import read_weights
from tests.artifact.faults import FULL, full_disk, in_a_process, kill, start, steps
from tests.methods.settings import raw

CHUNKS = [b"new ", memoryview(b"content"), b""]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(path):
    """Return all that is at `path`: bytes of a file, bytes by name of a folder, None of nothing."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return path.read_bytes() if path.exists() else None


class Material(NamedTuple):
    """Inputs of every writer, and two deltas: the old and the new."""

    base: Path
    shards: Path
    tunes: list[Path]
    deltas: list[Path]
    adapters: list[Path]


def shard(folder, state):
    folder.mkdir()
    for name, value in state.items():
        save_file({name: value}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    base = {name: torch.randn(4, 3) for name in ("a", "b")}
    factors = {f"base_model.model.x.lora_{name}.weight": torch.randn(shape) for name, shape in FACTORS.items()}
    found = Material(folder / "base.safetensors", shard(folder / "base", base), [], [], [])
    save_file(base, found.base)
    for version in (0, 1):
        tuned = {name: value + torch.randn(4, 3) for name, value in base.items()}
        found.tunes.append(folder / f"tuned{version}.safetensors")
        found.deltas.append(folder / f"delta{version}")
        found.adapters.append(folder / f"adapter{version}")
        save_file(tuned, found.tunes[-1])
        dtrain.compress(base, tuned, Dare(keep=0.5, seed=version)).save(found.deltas[-1])
        adapter = dtrain.lora_factors(
            (factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["x"]})
        )
        dtrain.compress(None, adapter, Dare(keep=0.5, seed=version)).save(found.adapters[-1])
    return found


FACTORS = {"A": (2, 4), "B": (4, 2)}


def save(material, folder, version):
    dtrain.load(material.deltas[version]).save(folder / "delta")
    return folder / "delta"


def merge(material, folder, version):
    commands.apply(str(material.base), str(material.deltas[version]), str(folder / "merged.safetensors"))
    return folder / "merged.safetensors"


def merge_shards(material, folder, version):
    commands.apply(str(material.shards), str(material.deltas[version]), str(folder / "merged.safetensors"))
    return folder / "merged.safetensors"


def share(material, folder, version):
    out, method = folder / "family.safetensors", SeededSign(keep=0.5, seed=version)
    commands.share(str(material.base), [str(path) for path in material.tunes], str(out), method, "mean")
    return out


def adapter(material, folder, version):
    """A folder: the old one is empty."""
    target = folder / "adapter"
    if version:
        commands.apply("zeros", str(material.adapters[1]), str(target))
        return target
    for file in target.iterdir() if target.exists() else ():
        file.unlink()
    target.mkdir(exist_ok=True)
    return target


#: Everything that dtrain writes without Lightning. What the callbacks write is under promise 12.
WRITERS = (save, merge, merge_shards, share, adapter)
over_writers = pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)


def both(writer, material, folder):
    """Return (path, content before, content after, steps in between), with the old content in place."""
    old = contents(writer(material, folder, 0))
    with steps() as taken:
        path = writer(material, folder, 1)
    new = contents(path)
    assert old != new
    return writer(material, folder, 0), old, new, taken.names


@over_writers
def test_a_failure_at_any_step(writer, material, tmp_path):
    path, old, new, names_of_steps = both(writer, material, tmp_path)
    last = names_of_steps.index("replace") + 1
    assert {"open", "write", "fsync", "replace", "open folder"} <= set(names_of_steps)
    for number in range(1, len(names_of_steps) + 1):
        for error in (FULL, KeyboardInterrupt()):
            # The name is there before the folder is synced, which not every file system can do.
            harmless = error is FULL and "open folder" in names_of_steps[max(0, number - 2) : number]
            done = number > last or harmless
            refused = re.escape(f"{path} cannot be written (No space left on device). Nothing was changed; give")
            with steps(number, error):
                if harmless:
                    writer(material, tmp_path, 1)
                elif error is FULL:
                    with pytest.raises(InputError, match=refused):
                        writer(material, tmp_path, 1)
                else:
                    with pytest.raises(KeyboardInterrupt):
                        writer(material, tmp_path, 1)
            assert contents(path) == (new if done else old), (number, error)
            assert names(tmp_path) == [path.name], (number, error)
            writer(material, tmp_path, 0)


@over_writers
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_process_ends_at_any_step(writer, material, tmp_path):
    path, old, new, names_of_steps = both(writer, material, tmp_path)
    last = names_of_steps.index("replace") + 1
    for number in range(1, len(names_of_steps) + 1):

        def work(number=number):
            with steps(number, lambda: os._exit(9)):
                writer(material, tmp_path, 1)

        assert in_a_process(work) == 9
        assert contents(path) == (new if number > last else old), number
        for left in tmp_path.iterdir():
            assert left == path or left.name.endswith(SUFFIX)
            os.utime(left, (time.time() - 90_000,) * 2)
        writer(material, tmp_path, 0)
        if writer is not adapter:  # whose next write is that of a new folder
            assert names(tmp_path) == [path.name], number
    writer(material, tmp_path, 1)
    assert names(tmp_path) == [path.name]


@over_writers
@pytest.mark.parametrize("share_of_it", [0, 0.5, 0.99])
def test_the_disk_is_full(writer, material, tmp_path, share_of_it):
    path, old, new, _ = both(writer, material, tmp_path)
    size = max(map(len, new.values())) if isinstance(new, dict) else len(new)
    refused = re.escape(f"{path} cannot be written (File too large). Nothing was changed; give a path")
    with full_disk(int(share_of_it * size)), pytest.raises(InputError, match=refused):
        writer(material, tmp_path, 1)
    assert contents(path) == old
    assert names(tmp_path) == [path.name]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_writer_is_killed_at_any_time(tmp_path):
    """A short loop; `python -m bench.kill_loop` kills a thousand writers of three kinds."""
    path, base = tmp_path / "delta", {"w": torch.randn(300, 300)}
    tuned = {"w": base["w"] + torch.randn(300, 300)}
    deltas = [dtrain.compress(base, tuned, Dare(keep=1, seed=seed)) for seed in (0, 1)]
    states = [raw(delta.state_dict(base)["w"]) for delta in deltas]
    deltas[0].save(path)

    def work():
        while True:
            for delta in deltas:
                delta.save(path)

    for _ in range(30):
        kill(start(work), after=0.02 * float(torch.rand(())))
        assert raw(dtrain.load(path).state_dict(base)["w"]) in states
    left = [name for name in names(tmp_path) if name != "delta"]
    assert left  # some were hit while they wrote
    assert all(name.endswith(SUFFIX) for name in left)


def half_files(folder, *stems):
    found = [folder / f".{stem}.0a1b2c3d{SUFFIX}" for stem in stems]
    for path in found:
        path.write_bytes(b"half")
    return found


def test_loaders_do_not_look_at_half_files(material, tmp_path):
    family = share(material, tmp_path, 0)
    tuned, method = material.tunes[0], dtrain.Dbms(SeededSign(keep=0.5), source="shared", lam=0.5, eta=1.0)
    delta = dtrain.compress(material.base, tuned, method, shared=family)
    delta.save(tmp_path / "task.safetensors")
    shards = shard(tmp_path / "base", read_weights(material.base).tensors)
    (shards / "model.safetensors.index.json").unlink()
    half_files(tmp_path, "task.safetensors", "family.safetensors", "a.safetensors")
    half_files(shards, "model.safetensors", "a.safetensors")
    dtrain.load(tmp_path / "task.safetensors").verify(shards)


def test_writers_remove_half_files_that_are_a_day_old(tmp_path):
    stale, fresh, other = half_files(tmp_path, "delta", "delta.x", "other")
    folder = tmp_path / f".folder.0a1b2c3d{SUFFIX}"
    folder.mkdir()
    half_files(folder, "weights")
    for path in (stale, other, folder):
        os.utime(path, (time.time() - 90_000,) * 2)
    write_atomic(tmp_path / "delta", CHUNKS)
    write_folder(tmp_path / "folder", {"a": b"1", "b": b"2"})
    assert names(tmp_path) == sorted([fresh.name, other.name, "delta", "folder"])
    assert contents(tmp_path / "folder") == {"a": b"1", "b": b"2"}


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError("from the source")], ids=repr)
def test_the_source_of_the_bytes_fails(tmp_path, error):
    def chunks():
        yield b"half of it"
        raise error

    (tmp_path / "delta").write_bytes(b"old")
    with pytest.raises(InputError if error is FULL else type(error)):
        write_atomic(tmp_path / "delta", chunks())
    assert contents(tmp_path) == {"delta": b"old"}


def test_cleaning_up_fails_as_well(tmp_path, monkeypatch):
    """The first reason counts: an interrupt stays one."""

    def unlink(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "unlink", unlink)
    for error, kind, reason in ((FULL, InputError, "No space"), (KeyboardInterrupt("^C"), KeyboardInterrupt, "C")):
        with steps(3, error), pytest.raises(kind, match=reason):
            write_atomic(tmp_path / "delta", CHUNKS)
        assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda path: write_atomic(path, CHUNKS), "none/delta"),
        (lambda path: write_atomic(path, CHUNKS), "file/delta"),
        (lambda path: write_folder(path, {"a": b""}), "none/folder"),
        (make_folder, "file/folder"),
        (make_folder, "file"),
    ],
)
def test_a_place_that_cannot_be(tmp_path, make, where):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(InputError, match=rf"{where} cannot be written \(.*; give a path you may write to"):
        make(tmp_path / where)
    assert contents(tmp_path) == {"file": b"old"}


def test_a_folder_that_is_taken(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_bytes(b"old")
    (tmp_path / "file").write_bytes(b"old")
    for name in ("folder", "file"):
        with pytest.raises(InputError, match="there already and not an empty folder"):
            write_folder(tmp_path / name, {"a": b""})
    assert names(tmp_path) == ["file", "folder"]
    assert contents(tmp_path / "folder") == {"mine": b"old"}
