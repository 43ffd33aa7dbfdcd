"""Promise 9: concurrent use. The last writer wins whole, and whoever reads keeps what was there when he began."""

import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import dtrain
from dtrain import Dare
from dtrain.artifact.atomic import write_atomic, write_folder
from dtrain.cli import main
from dtrain.weights import read_weights
from tests.artifact.faults import start
from tests.methods.settings import bytes_of, raw, same_bits

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def versions(number):
    """Return a base and several deltas to it, which differ in size as well."""
    base = {"w": torch.randn(60, 50)}
    tuned = {"w": torch.randn(60, 50)}
    return base, [dtrain.compress(base, tuned, Dare(keep=(i + 1) / number, seed=i)) for i in range(number)]


@FORKS
def test_processes_write_to_one_path_while_another_reads(tmp_path):
    path, rounds = tmp_path / "delta", 40
    _, deltas = versions(3)
    whole = [bytes(bytes_of(delta)) for delta in deltas]
    deltas[0].save(path)
    seen = set()

    def write(delta):
        for _ in range(rounds):
            delta.save(path)

    children = [start(lambda delta=delta: write(delta)) for delta in deltas]
    while children:
        content = path.read_bytes()
        assert content in whole
        seen.add(whole.index(content))
        assert bytes(bytes_of(dtrain.load(path))) in whole
        children = [child for child in children if not ended(child)]
    assert len(seen) > 1
    assert names(tmp_path) == ["delta"]


def ended(child):
    done, status = os.waitpid(child, os.WNOHANG)
    assert not done or os.waitstatus_to_exitcode(status) == 0
    return bool(done)


def in_threads(works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_write_to_one_path(tmp_path):
    path = tmp_path / "delta"
    contents = [bytes([i]) * 100_000 for i in range(4)]
    in_threads([lambda c=content: write_atomic(path, [c[:50_000], c[50_000:]]) for content in contents])
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["delta"]


def test_threads_make_one_folder(tmp_path):
    """The first one wins: a folder that holds something is never replaced."""
    folder, refused = tmp_path / "adapter", []

    def make(content):
        try:
            write_folder(folder, {"a": content, "b": content})
        except dtrain.InputError as error:
            refused.append(str(error))

    in_threads([lambda i=i: make(bytes([i]) * 50_000) for i in range(4)])
    assert len(refused) == 3
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert names(tmp_path) == ["adapter"]


def test_a_delta_keeps_what_it_read(tmp_path):
    base, (old, new) = versions(2)
    old.save(tmp_path / "delta")
    loaded = dtrain.load(tmp_path / "delta")
    new.save(tmp_path / "delta")
    assert same_bits(loaded.state_dict(base), old.state_dict(base))
    assert same_bits(dtrain.load(tmp_path / "delta").state_dict(base), new.state_dict(base))
    (tmp_path / "delta").unlink()
    assert same_bits(loaded.state_dict(base), old.state_dict(base))


def test_weights_keep_what_they_map(tmp_path):
    """The base's file is mapped, not read: the old one stays for as long as somebody looks at it."""
    base, (delta, _) = versions(2)
    path = tmp_path / "base.safetensors"
    save_file(base, path)
    delta.save(tmp_path / "delta")
    mapped = read_weights(path).tensors
    assert main(["apply", str(path), str(tmp_path / "delta"), str(path)]) == 0  # over the file it is made from
    assert same_bits(mapped, base)
    assert same_bits(load_file(path), delta.state_dict(base))


def test_a_delta_is_saved_over_the_file_it_came_from(tmp_path):
    base, (delta, _) = versions(2)
    path = tmp_path / "delta"
    delta.save(path)
    before = path.read_bytes()
    for _ in range(2):
        loaded = dtrain.load(path)
        loaded.save(path)
        assert path.read_bytes() == before
        assert raw(loaded.state_dict(base)["w"]) == raw(delta.state_dict(base)["w"])


def test_compressing_into_the_folder_of_its_inputs(tmp_path):
    """What is loaded from a path may be compressed and saved to that path, though the file is mapped."""
    base, tuned = {"w": torch.randn(6, 5)}, {"w": torch.randn(6, 5)}
    for suffix, save in ((".safetensors", save_file), (".ckpt", torch.save)):
        path = tmp_path / f"tuned{suffix}"
        save(tuned, path)
        delta = dtrain.compress(base, path, dtrain.Lossless())
        delta.save(path)
        assert same_bits(dtrain.load(path).state_dict(base), tuned)
