"""The report: every byte counted, by kind of tensor and by what was done with it."""

import json

import pytest
import torch

import dtrain
from dtrain import Lossless, Rules, SeededSign


def pair():
    torch.manual_seed(0)
    base = {
        "m.word_embeddings.weight": torch.randn(30, 16),
        "m.position_embeddings.weight": torch.randn(6, 16),
        "m.cls_token": torch.randn(1, 1, 16),
        "m.steps": torch.tensor(3),
        "m.norm.weight": torch.ones(16),
        "m.up.bias": torch.zeros(16),
        "m.up.weight": torch.randn(16, 16),
        "m.down.weight": torch.randn(16, 16),
        "m.still.weight": torch.randn(16, 16),
    }
    tuned = {name: value + (1 if name == "m.steps" else 0.1) for name, value in base.items()}
    tuned |= {"m.still.weight": base["m.still.weight"], "head.weight": torch.randn(2, 16), "head.bias": torch.randn(2)}
    return base, tuned


def rows_of(report):
    return {(row.kind, row.done): (row.tensors, row.payload_bytes, row.value_bits) for row in report.rows}


def test_rows_by_kind_and_by_what_was_done():
    report = dtrain.compress(*pair(), SeededSign(keep=1 / 16), rules=Rules(exclude=["*.down.*"])).report()
    assert rows_of(report) == {
        ("matrix", "method"): (1, 2, None),
        ("matrix", "half"): (1, 512, None),
        ("matrix", "same"): (1, 0, None),
        ("embedding", "method"): (1, 1, None),
        ("embedding", "drop"): (1, 0, None),
        ("vector", "coded"): (2, 4, 1),
        ("token", "half"): (1, 32, None),
        ("buffer", "bits"): (1, 8, None),
        ("fresh", "exact"): (1, 8, None),
        ("fresh", "rounded"): (1, 2 * 16 + 2 * 2, 8),
    }
    assert report.rows[0].bits_per_element == pytest.approx(8 * 2 / 256)


@pytest.mark.parametrize("method", [SeededSign(), dtrain.Dare(keep=1), dtrain.Ecsq(), Lossless()], ids=repr)
def test_every_byte_and_every_tensor_is_counted_once(method, tmp_path):
    delta = dtrain.compress(*pair(), method)
    report, size = delta.report(), delta.save(tmp_path / "d")
    assert sum(row.payload_bytes for row in report.rows) + report.manifest_bytes == report.file_bytes == size
    assert sum(row.tensors for row in report.rows) == report.tensors == 11
    assert sum(row.elements for row in report.rows) == report.elements


def test_what_a_program_reads():
    report = dtrain.compress(*pair(), SeededSign(), rules=Rules(vectors="uniform8")).report()
    found = json.loads(json.dumps(report.as_dict()))
    assert found["manifest_bytes"] == report.manifest_bytes
    assert found["dropped"] == ["m.word_embeddings.weight"]
    (row,) = (row for row in found["rows"] if row["kind"] == "vector")
    assert (row["done"], row["value_bits"], row["bits_per_element"]) == ("coded", 8, 8.0)


def test_what_people_read():
    text = str(dtrain.compress(*pair(), SeededSign()).report())
    for words in ("left at the base by a rule", "delta, 1 bit a value", "stored whole, 8 bit a value", "bit for bit"):
        assert words in text
    assert "left at the base (see the rules `drop` and `embeddings`): m.word_embeddings.weight" in text
    many = dtrain.compress(*pair(), SeededSign(), rules=Rules(drop=["m.[cdpu]*", "m.norm*"])).report()
    assert many.notes()[-1].endswith("m.norm.weight, m.position_embeddings.weight and 3 more")
