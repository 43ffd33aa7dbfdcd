"""Promise 11: names are data. They become no paths, no markup and no commands to a terminal, and each occurs once."""

import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

import dtrain
from dtrain import ArtifactError, Dare, InputError
from dtrain.artifact import manifest as manifest_module
from dtrain.artifact import unpack_file
from dtrain.artifact.names import MAX_NAME, restore, shorten
from dtrain.cli.commands import apply, inspect
from dtrain.report import visible
from tests.artifact.craft import build, manifest, record
from tests.methods.settings import same_bits, tiny

NAMES = [
    "../../x", "/etc/passwd", "a\0b", "a\nb", "é", "\U0001f600", "", " ", "x" * 5000, "\x1b[2J\x07", "[red]", "[/no]",
    "C:\\x", "con", "a" * MAX_NAME, "\u202egnp.exe", "__metadata__", "{0}%s$(true)`true`",
]  # fmt: skip
named = pytest.mark.parametrize("name", NAMES, ids=[ascii(name[:20]) for name in NAMES])


def pair(name):
    base = {name: torch.zeros(2, 2), "w": torch.zeros(1)}
    return base, dtrain.compress(base, {name: torch.ones(2, 2), "w": torch.ones(1)}, Dare(keep=1))


@named
def test_a_name_is_data(name, tmp_path):
    base, delta = pair(name)
    delta.save(tmp_path / "delta")
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
    assert same_bits(dtrain.load(tmp_path / "delta").state_dict(base), delta.state_dict(base))


@named
def test_a_name_is_shown_as_text(name, tmp_path):
    _, delta = pair(name)
    delta.content.metadata["method"]["name"] = name
    delta.save(tmp_path / "delta")
    loaded, console = dtrain.load(tmp_path / "delta"), Console(file=io.StringIO(), width=10**5)
    for part in inspect(str(tmp_path / "delta"), tensors=True).shown:
        console.print(part, markup=False, highlight=False)
    for shown in (console.file.getvalue(), str(loaded.report()), repr(loaded)):
        assert all(char.isprintable() or char == "\n" for char in shown)
    assert visible(name) in console.file.getvalue()


@named
def test_a_merged_model_is_one_file(name, tmp_path):
    if name == "__metadata__":
        return  # the test below
    base, delta = pair(name)
    delta.save(tmp_path / "delta")
    torch.save(base, tmp_path / "base.pt")
    apply(str(tmp_path / "base.pt"), str(tmp_path / "delta"), str(tmp_path / "out.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pt", "delta", "out.safetensors"]
    assert same_bits(load_file(tmp_path / "out.safetensors"), delta.state_dict(base))


@pytest.mark.parametrize("size", [MAX_NAME + 1, 10**6])
def test_a_name_of_a_megabyte_is_refused_by_writer_and_reader(size):
    with pytest.raises(InputError, match="a tensor name is longer than 16384 bytes"):
        pair("x" * size)[1].file_bytes()
    with pytest.raises(ArtifactError, match="a name is longer than 16384 bytes"):
        unpack_file(build(manifest(records=[record(b"x" * size)])))


def test_all_names_together_have_a_limit(monkeypatch):
    monkeypatch.setattr(manifest_module, "MAX_ALL_NAMES", 3)
    with pytest.raises(ArtifactError, match="the tensor names take more than 3 bytes"):
        unpack_file(build(manifest(records=[record(b"ab"), record(b"b", code=(1, 2, 0))]), bytes(8)))


def test_a_name_that_grows_by_borrowing_is_refused():
    records = [record(b"x" * MAX_NAME), record(b"y", [b""], code=(1, MAX_NAME, 0))]
    with pytest.raises(ArtifactError, match="a name is longer than 16384 bytes"):
        unpack_file(build(manifest(records=records)))


@pytest.mark.parametrize("key", ["manifest", "payload", "sha256", "__metadata__"])
def test_a_key_of_the_header_occurs_once(key):
    raw = build()
    size = int.from_bytes(raw[:8], "little")
    text = bytes(raw[8 : 8 + size]).decode().rstrip()
    value = json.dumps(json.loads(text)[key], separators=(",", ":"), sort_keys=True)
    twice = text.replace(f'"{key}":{value}', f'"{key}":{value},"{key}":{value}').encode()
    twice += b" " * (-len(twice) % 8)
    assert len(twice) > size
    with pytest.raises(ArtifactError, match="header: this is not a delta file of dtrain, or it is damaged"):
        unpack_file(bytearray(len(twice).to_bytes(8, "little") + twice + raw[8 + size :]))


def test_a_tensor_occurs_once():
    for names in ((b"w", b"w"), (b"w", b"v")):
        table = manifest(records=[record(name, [b"\0\0\0\0"]) for name in names])
        with pytest.raises(ArtifactError, match="the tensor names are not in ascending order"):
            unpack_file(build(table, bytes(8)))


def test_a_name_is_text():
    for name in (b"\xff", b"\xed\xa0\x80", b"\xc0\x80"):
        with pytest.raises(ArtifactError, match="manifest: 'utf-8' codec can't decode"):
            unpack_file(build(manifest(records=[record(name)])))


@given(st.lists(st.binary(max_size=12) | st.integers(0, 300).map(lambda i: b"layer.%d.w" % i), unique=True))
def test_names_round_trip(names):
    found = []
    for code in shorten(sorted(names)):
        found.append(restore(code, found))
    assert found == sorted(names)


def test_an_adapter_is_written_where_it_was_asked_for(tmp_path):
    """A file may say of itself what it likes: its names reach no path."""
    _, delta = tiny()
    delta.content.metadata["adapter"] = {"peft_type": "../../x"}
    with pytest.raises((InputError, dtrain.BaseMismatchError)):
        dtrain.save_adapter(delta, tmp_path / "folder")
    assert not list(tmp_path.iterdir())
