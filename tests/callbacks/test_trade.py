"""The objective that trades bytes against score, and when it is logged."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.callbacks.trade import Trade
from dtrain.errors import InputError
from tests.callbacks.models import QUIET, Classifier, Memory, checkpoints, compress, fit

SIZES = st.integers(1, 2**40)
SCORES = st.floats(-1, 1)
TOLERANCES = st.floats(1e-4, 0.5)


@given(SIZES, st.floats(-1, 1), TOLERANCES)
def test_within_the_tolerance_only_bytes_count(size, share, tolerance):
    trade = Trade(tolerance)
    assert trade.values(size, share * tolerance) == {"dtrain/objective": math.log10(size), "dtrain/feasible": 1.0}


@given(SIZES, st.sampled_from([(1, 10), (3, 100), (7, 1000)]), TOLERANCES)
def test_tolerances_beyond_weigh_as_much_as_bytes(size, pair, tolerance):
    beyond, factor = pair
    trade = Trade(tolerance)
    assert trade.objective(size, (1 + beyond) * tolerance) == pytest.approx(math.log10(size * factor))
    assert trade.values(size, (1 + beyond) * tolerance)["dtrain/feasible"] == 0.0


@given(SIZES, SIZES, SCORES, SCORES, TOLERANCES)
def test_fewer_bytes_and_a_better_score_are_never_worse(one, other, score, worse, tolerance):
    trade = Trade(tolerance)
    small, large = sorted((one, other))
    low, high = sorted((score, worse))
    assert trade.objective(small, low) <= trade.objective(large, high)


@given(TOLERANCES)
def test_it_does_not_jump(tolerance):
    shortfalls = [tolerance * step / 100 for step in range(400)]
    values = [Trade(tolerance).objective(1000, shortfall) for shortfall in shortfalls]
    assert max(after - before for before, after in pairwise(values)) <= 0.0145  # 0.01 / ln 2


@pytest.mark.parametrize(("reference", "short"), [(None, 0.125), (0.9375, 0.1875)])
def test_what_the_score_is_held_against(reference, short):
    trade = Trade(reference=reference)
    assert trade.shortfall(0.75, 0.875, "max") == short
    assert trade.shortfall(-0.75, -0.875, "min") == (short if reference is None else -1.6875)


def test_what_is_no_number_is_not_good_enough():
    values = Trade().values(1000, math.nan)
    assert math.isnan(values["dtrain/objective"])
    assert values["dtrain/feasible"] == 0.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tolerance": 0.0}, "must be above 0"),
        ({"tolerance": -1.0}, "must be above 0"),
        ({"tolerance": math.inf}, "must be above 0"),
        ({"reference": math.nan}, "must be a score"),
    ],
)
def test_settings_that_cannot_work(options, sentence):
    with pytest.raises(InputError, match=sentence):
        compress(**options)


def objectives(memory):
    return [values["dtrain/objective"] for _, values in memory.values if "dtrain/objective" in values]


@pytest.mark.filterwarnings("ignore:.*val_loss.*")
class TestInARun:
    pytestmark = QUIET

    @pytest.mark.parametrize("monitor", ["val_acc", None], ids=["own", "of the checkpoints"])
    def test_with_a_reference_every_validation_counts(self, tmp_path, monitor):
        """What is logged before there is a file is the objective of the whole model: no search takes it for better."""
        memory, trade = Memory(), Trade(0.01, 0.9)
        callback = compress(monitor=monitor, tolerance=0.01, reference=0.9)
        saver = checkpoints(tmp_path, monitor="val_acc", mode="max")
        trainer = fit(Classifier(), tmp_path, callback, saver, logger=memory, epochs=3)
        while_training, last = objectives(memory)[:-1], objectives(memory)[-1]
        logged = [values["val_acc"] for _, values in memory.values if "val_acc" in values]
        whole = callback.outcome.report.checkpoint_bytes
        assert while_training == pytest.approx([trade.objective(whole, 0.9 - score) for score in logged])
        assert len(while_training) == 3
        compressed = callback.outcome.scores["compressed"]["val_acc"]
        assert last == trade.objective(callback.outcome.report.file_bytes, 0.9 - compressed)
        assert callback.outcome.traded["dtrain/feasible"] == float(0.9 - compressed <= 0.01)
        assert trainer.global_step == 9

    def test_without_one_only_the_file_does(self, tmp_path):
        memory = Memory()
        callback = compress(monitor="val_acc")
        fit(Classifier(), tmp_path, callback, logger=memory)
        assert objectives(memory) == [Trade().objective(callback.outcome.report.file_bytes, callback.outcome.drop)]

    def test_without_a_metric_there_is_none(self, tmp_path):
        memory = Memory()
        callback = compress(reference=0.9)
        fit(Classifier(), tmp_path, callback, logger=memory)
        assert objectives(memory) == []
        assert callback.outcome.traded == {}
