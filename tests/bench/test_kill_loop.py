"""The loop of kills finds half files where there are some, and none of dtrain's."""

import time

import pytest
import torch

from bench import kill_loop

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def row_of(writer, folder):
    return kill_loop.kill_loop(writer, folder / f"file{writer.suffix}", 5, lambda _: None)


def test_dtrain_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_loop, "BYTES", 40_000)
    writer = kill_loop.writers()["dtrain Delta.save"]
    row = row_of(writer, tmp_path)
    assert (row.kills, row.damaged, row.mixed) == (5, 0, 0)
    assert row.file_bytes > 40_000


def test_a_writer_in_two_halves_is_found_out(tmp_path):
    def save(value, path):
        with path.open("wb") as file:
            for _ in range(2):
                file.write(bytes([value]) * 4)
                file.flush()
                time.sleep(0.01)

    def read(path):
        data = path.read_bytes()
        if len(data) != 8:
            raise ValueError("cut short")
        return torch.tensor(list(data))

    row = row_of(kill_loop.Writer(".bin", (1, 2), save, read), tmp_path)
    assert row.damaged > 0
    assert row.mixed == row.temporaries == 0
