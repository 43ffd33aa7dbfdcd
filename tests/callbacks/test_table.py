"""The table a run ends with."""

from __future__ import annotations

import io

from rich.console import Console

import dtrain
from dtrain.callbacks.table import describe, outcome_table
from tests.callbacks.models import Net


def lines(scores, monitor=None, width=80):
    base, tuned = Net().state_dict(), Net().state_dict()
    report = dtrain.compress(base, tuned, dtrain.Dare(keep=0.5)).report()
    console = Console(file=io.StringIO(), width=width)
    console.print(outcome_table(scores, report, monitor))
    return report, console.file.getvalue().splitlines()


def scores(**values):
    return {
        who: {name: three[i] for name, three in values.items()}
        for i, who in enumerate(("base", "finetuned", "compressed"))
    }


def row(found, name):
    return next(line for line in found if name in line).replace("│", " ").split()


def test_rows():
    report, found = lines(scores(loss=(2.0, 1.0, 1.1), acc=(0.5, 0.9, 0.8), same=(1.0, 1.0, 1.0)), "loss")
    assert found[0].strip() == "Dare(keep=0.5, seed=0, mask='bernoulli', values='float16')"
    assert row(found, "loss") == ["loss", "2.0000", "1.0000", "1.1000", "90.0%"]
    assert row(found, "acc") == ["acc", "0.5000", "0.9000", "0.8000", "75.0%"]
    assert row(found, "same") == ["same", "1.0000", "1.0000", "1.0000", "-"]
    assert row(found, "bytes") == ["bytes", f"{report.checkpoint_bytes:,}", f"{report.file_bytes:,}"]
    assert row(found, "ratio") == ["ratio", "1", f"{report.ratio:,.1f}"]
    names = [name for line in found for name in ("loss", "acc", "same") if f" {name} " in line]
    assert names == ["loss", "acc", "same"]  # the monitored one first


def test_without_scores():
    _, found = lines({})
    assert not any("nan" in line for line in found)
    assert row(found, "ratio")


def test_long_names_fit():
    name = "val_accuracy/dataloader_idx_0"
    _, found = lines(scores(**{name: (0.1, 0.2, 0.3)}))
    assert row(found, name)[0] == name


def test_a_metric_that_only_some_models_have():
    _, found = lines({"base": {}, "finetuned": {"acc": 1.0}, "compressed": {"acc": 1.0}})
    assert row(found, "acc") == ["acc", "-", "1.0000", "1.0000", "-"]


def test_describe():
    assert describe({"name": "DareX", "keep": 0.1, "q": "search"}) == "DareX(keep=0.1, q='search')"
