"""Promise 8: a file is readable for years. Golden files of every version, and two corpora of odd and damaged ones."""

import json
import re
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain import METHODS, ArtifactError
from dtrain.artifact import FORMAT_VERSION, Role
from dtrain.artifact.manifest import DTYPES
from dtrain.stages import STAGES
from dtrain.weights import digest
from tests.artifact import make_golden, reference_decoder
from tests.artifact.make_golden import GOLDEN, HERE, bytes_of, compressed, tensors
from tests.methods.settings import raw

BASES = {name: tensors(state) for name, state in json.loads((GOLDEN / "bases.json").read_text()).items()}
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
#: Their bytes follow from seeds and rounding alone; those of the others from linear algebra or from inputs as well, and
#: those of `lossless` from the level of Zstandard, which was 9 when its golden file was written, and from its version.
SAME_BYTES = (
    "dare",
    "structured",
    "magnitude",
    "bitdelta",
    "compeft",
    "ultradelta",
    "ecsq",
    "seededsign",
    "dbms",
)


def of(names=tuple(EXPECTED)):
    return pytest.mark.parametrize("name", names)


def golden(name):
    return dtrain.load(GOLDEN / f"{name}.safetensors")


def test_there_is_a_golden_file_of_everything():
    assert {method.__name__.lower() for method in METHODS} <= set(EXPECTED)
    records = [record for name in EXPECTED for record in golden(name).content.records]
    stages = {type(stage) for record in records for item in record.payloads for stage in vars(item.pipeline).values()}
    assert stages == {stage for room in STAGES for stage in room}
    assert {record.role for record in records} == set(Role)
    assert {record.dtype for record in records} == set(DTYPES)
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 100_000


@of()
def test_a_golden_file_means_what_it_meant(name):
    base = BASES[EXPECTED[name]["base"]]
    delta, file = golden(name), reference_decoder.parse((GOLDEN / f"{name}.safetensors").read_bytes())
    if delta.content.shared:
        file = reference_decoder.resolve(file, (GOLDEN / "family.safetensors").read_bytes())
    state = delta.state_dict(base)
    assert sorted(state) == sorted(EXPECTED[name]["tensors"])
    plain = {key: raw(value) for key, value in base.items()}
    for key, tensor in state.items():
        record = file.records.get(key, file.records.get("lm.weight"))  # a tied tensor is written once
        assert reference_decoder.agrees(record, plain.get(key), raw(tensor))
        if reference_decoder.exact(record):
            assert digest(tensor).hex().startswith(EXPECTED[name]["tensors"][key]), key
    assert delta.content.fingerprint == reference_decoder.fingerprint(file, plain)


@of(SAME_BYTES)
def test_what_is_written_today_is_what_was_written(name):
    method = next(method for method in METHODS if method.__name__.lower() == name)
    assert bytes_of(compressed(make_golden.chosen(method))[1]) == (GOLDEN / f"{name}.safetensors").read_bytes()


@of(("dtypes", "codes", "family", "task_of_family"))
def test_a_golden_file_is_written_again_as_it_was_read(name):
    delta = golden(name)
    assert bytes_of(delta) == (GOLDEN / f"{name}.safetensors").read_bytes()


def corpus(group):
    expected = json.loads((HERE / group / "expected.json").read_text())
    return pytest.mark.parametrize(("name", "message"), expected.items(), ids=expected)


@corpus("critical")
def test_a_critical_file_is_refused_with_its_sentence(name, message, monkeypatch):
    monkeypatch.chdir(HERE / "critical")
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        dtrain.load(name).state_dict({"w": torch.zeros(2)})


@corpus("non_critical")
def test_a_non_critical_file_is_read(name, message):
    assert message is None
    delta = dtrain.load(HERE / "non_critical" / name)
    assert str(delta.report())
    if "crc" not in name:  # which a reader need not look at, and the reference decoder does
        reference_decoder.parse((HERE / "non_critical" / name).read_bytes())


def test_the_corpora_are_what_the_script_writes(tmp_path):
    make_golden.write_damaged(tmp_path)
    for group in ("critical", "non_critical"):
        files = {path.name: path.read_bytes() for path in (tmp_path / group).iterdir()}
        assert files.items() <= {path.name: path.read_bytes() for path in (HERE / group).iterdir()}.items()


def test_this_is_version_one():
    assert FORMAT_VERSION == 1
    assert "Version 1 is frozen" in Path(dtrain.artifact.__file__).with_name("FORMAT.md").read_text()
