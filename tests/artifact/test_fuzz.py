"""The fuzzer of `make fuzz`, for a short time: only `ArtifactError` comes out, and most inputs pass the checksums."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import fuzz
from dtrain.weights import digest
from tests.artifact import mutations, reference_decoder

NUMBER = 400


def tally(tmp_path):
    return fuzz.Tally(tmp_path / "tally.json")


def test_one_element_that_was_expanded_has_bytes():
    """A finding: a base of zeros takes no memory, and a tensor of one element in it was no view of bytes."""
    for shape in ((1, 1), (0, 3), ()):
        assert digest(torch.zeros(()).expand(shape)) == digest(torch.zeros(shape))


def test_the_seeds_are_files_that_load(tmp_path):
    found = tally(tmp_path)
    for number, spec in enumerate(mutations.seeds()):
        family = mutations.assemble(spec.family) if spec.family else None
        spec = spec.copy()
        spec.shared = family[-32:] if family else b""
        fuzz.run(mutations.assemble(spec), family, mutations.seeded(0, number), found)
    assert found.past == len(mutations.seeds())
    assert not found.findings
    assert not found.kinds.get("load")


@pytest.mark.parametrize("index", [36957, 112142, 129529, 398362, 1860667])
def test_what_only_the_fuzzer_found_wrong(index):
    """A tensor called `bfloat16.w`, which no module can have; a NaN of other bits than the reference decoder's."""
    rng = mutations.seeded(3, index)
    fuzz.run(*mutations.case(rng)[1:], rng, fuzz.Tally(fuzz.FOLDER / "no such file"))


def test_a_run_finds_nothing_and_most_inputs_get_past_the_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 60.0)
    found = tally(tmp_path)
    for index in range(NUMBER):
        fuzz.once(0, index, found)
    assert not found.findings
    assert found.past > NUMBER / 2
    assert found.runs["load"] == NUMBER
    assert found.runs["apply"] == found.runs["inspect"] > NUMBER / 10
    assert sum(map(len, found.kinds.values())) > 20


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**40))
def test_only_artifact_errors_come_out(index):
    rng = mutations.seeded(77, index)
    fuzz.run(*mutations.case(rng)[1:], rng, fuzz.Tally(fuzz.FOLDER / "no such file"))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_bytes_that_a_guided_fuzzer_chooses_make_an_input(data):
    rng = fuzz.Bytes(data)
    fuzz.run(*mutations.case(rng)[1:], rng, fuzz.Tally(fuzz.FOLDER / "no such file"))


def test_an_input_hangs_on_its_number_alone():
    cases = [[mutations.case(mutations.seeded(3, index)) for index in range(20)] for _ in range(2)]
    assert cases[0] == cases[1]


def test_a_finding_is_written_down_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(fuzz, "inspect", broken)
    monkeypatch.setattr(fuzz, "FOLDER", tmp_path)
    found = tally(tmp_path)
    for index in range(40):
        fuzz.once(0, index, found)
    found.save()
    known = json.loads((tmp_path / "tally.json").read_text())
    assert {(entry["target"], entry["error"].split(":")[0]) for entry in known["findings"]} == {
        ("inspect", "ZeroDivisionError")
    }
    assert fuzz.Tally(tmp_path / "tally.json").runs == found.runs
    assert "on purpose" in capsys.readouterr().err


@pytest.mark.parametrize("spec", mutations.seeds()[::40], ids=str)
def test_taken_apart_and_put_together_it_is_the_same(spec):
    data = mutations.assemble(spec)
    assert mutations.assemble(mutations.parse(data)) == data or not reference_decoder.parse(data).records
