"""Masks that follow rows and columns: whole groups, whole units, with the statistics they promise."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import InputError
from dtrain.stages import UNITS, Bernoulli, Groups, Units, structure
from tests.artifact import reference_stages as reference

GRIDS = st.tuples(st.integers(0, 12), st.integers(0, 40))
SEEDS = st.integers(0, 2**64 - 1)
CHI_SQUARE = {5: 20.5, 9: 27.9, 7: 24.3}  # the 0.999 quantile by degrees of freedom


def dense(select, grid, name="w"):
    """The mask as a matrix of zeros and ones."""
    mask = torch.zeros(math.prod(grid), dtype=torch.int64)
    mask[select.positions(name, grid)] = 1
    return mask.view(grid)


def check(select, parameters, grid, name):
    found = select.positions(name, grid)
    assert found.dtype == torch.int64
    assert bool((found.diff() > 0).all())
    least, most = select.count_bounds(grid)
    assert 0 <= least <= found.numel() <= most <= math.prod(grid)
    assert found.tolist() == reference.positions((select.tag, *parameters), name, grid)


@given(GRIDS, st.integers(2, 50), st.data(), SEEDS, st.text(max_size=8))
def test_any_mask_of_groups_is_well_formed_and_the_references(grid, size, data, seed, name):
    kept = data.draw(st.integers(1, size - 1))
    check(Groups(size, kept, seed), (size, kept, seed), grid, name)


@given(GRIDS, st.sampled_from([0, 1, 2]), st.integers(1, 9), st.floats(0.001, 0.999), SEEDS, st.text(max_size=8))
def test_any_mask_of_units_is_well_formed_and_the_references(grid, unit, block, keep, seed, name):
    block = block if UNITS[unit] == "block" else 1
    check(Units(unit, block, keep, seed), (unit, block, keep, seed), grid, name)


@pytest.mark.parametrize(("size", "kept"), [(2, 1), (8, 3), (16, 15), (100, 1)])
def test_every_whole_group_keeps_exactly_its_share(size, kept):
    mask = dense(Groups(size, kept, 0), (30, 3 * size))
    assert bool((mask.view(30, 3, size).sum(2) == kept).all())


@pytest.mark.parametrize(("size", "kept", "freedom"), [(4, 2, 5), (5, 3, 9), (8, 1, 7)])
def test_groups_are_uniform_over_subsets(size, kept, freedom):
    """Chi-square over all subsets, of 6000 groups, at the 0.001 level; then over pairs of neighbouring groups."""
    places = Groups(size, kept, 1).positions("w", (1, 6000 * size)).view(6000, kept) % size
    subsets = {subset: i for i, subset in enumerate(itertools.combinations(range(size), kept))}
    drawn = torch.tensor([subsets[tuple(row)] for row in places.tolist()])
    assert len(subsets) == freedom + 1
    assert chi_square(drawn, len(subsets)) < CHI_SQUARE[freedom]
    pairs, cells = drawn[:-1] * len(subsets) + drawn[1:], len(subsets) ** 2
    # With many degrees of freedom chi-square is nearly normal: within five deviations of its mean.
    assert abs(chi_square(pairs, cells) - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))


def chi_square(drawn, cells):
    expected = drawn.numel() / cells
    return float(((torch.bincount(drawn, minlength=cells) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("columns", "size", "kept"), [(10, 4, 1), (11, 8, 5), (9, 8, 1)])
def test_ragged_ends_are_unbiased(columns, size, kept):
    """Every column is kept with probability kept / size, the last ones too: within five deviations over 4000 rows."""
    shares = dense(Groups(size, kept, 2), (4000, columns)).double().mean(0)
    chance = kept / size
    assert float((shares - chance).abs().max()) < 5 * math.sqrt(chance * (1 - chance) / 4000)


@pytest.mark.parametrize("grid", [(64, 3), (24, 8), (192, 1)])
def test_groups_run_on_across_rows_that_are_too_short(grid):
    flat = Groups(16, 2, 0).positions("w", (1, 192))
    assert torch.equal(Groups(16, 2, 0).positions("w", grid), flat)
    assert torch.bincount(flat // 16).tolist() == [2] * 12


def test_groups_do_not_depend_on_chunks(monkeypatch):
    whole = Groups(6, 2, 0).positions("w", (40, 20))
    monkeypatch.setattr(structure, "_WORDS_PER_CHUNK", 1)
    assert torch.equal(Groups(6, 2, 0).positions("w", (40, 20)), whole)


def test_equal_words_are_taken_in_order(monkeypatch):
    """Words are 32 bits long, so that ties do occur: once in some two million groups of 64."""
    monkeypatch.setattr(structure, "words", lambda key, start, count, device: torch.arange(count) % 2)
    assert Groups(100, 60, 0).positions("w", (1, 100)).tolist() == sorted([*range(0, 100, 2), *range(1, 20, 2)])


def as_units(mask, unit, block):
    """Return the kept share of every unit."""
    if UNITS[unit] == "block":
        return torch.nn.functional.avg_pool2d(mask[None].double(), block)
    return mask.double().mean(1 - unit)


@pytest.mark.parametrize(("unit", "block", "grid"), [(0, 1, (4000, 3)), (1, 1, (3, 4000)), (2, 4, (256, 256))])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_units_are_whole_and_kept_at_their_rate(unit, block, grid, keep):
    shares = as_units(dense(Units(unit, block, keep, 0), grid), unit, block)
    assert set(shares.view(-1).tolist()) == {0.0, 1.0}
    assert abs(float(shares.mean()) - keep) < 5 * math.sqrt(keep * (1 - keep) / shares.numel())


@pytest.mark.parametrize("grid", [(10, 14), (3, 20), (1, 9)])
def test_blocks_are_cut_off_at_the_edges(grid):
    """Every element stands for its block: the mask of one element a block says which."""
    blocks = dense(Units(2, 1, 0.4, 5), (-(-grid[0] // 4), -(-grid[1] // 4)))
    whole = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)[: grid[0], : grid[1]]
    assert torch.equal(dense(Units(2, 4, 0.4, 5), grid), whole)


def test_bounds_know_what_edges_cut_off():
    """Of two rows of blocks the lower one has one line of the tensor: 3/8 of the blocks' elements are not there."""
    select = Units(2, 4, 0.999, 0)
    least, most = select.count_bounds((5, 40_000))
    assert 0 < least < select.positions("w", (5, 40_000)).numel() <= most == 200_000


def test_a_block_costs_no_more_than_what_is_there():
    start = time.perf_counter()
    found = Units(2, 1024, 0.5, 0).positions("w", (1, 400_000))
    assert time.perf_counter() - start < 1
    assert 0 < found.numel() < 400_000


def test_blocks_of_one_are_bernoulli():
    assert torch.equal(Units(2, 1, 0.3, 7).positions("w", (20, 30)), Bernoulli(0.3, 7).positions("w", (20, 30)))


MASKS = [lambda seed: Groups(10, 1, seed), lambda seed: Units(2, 2, 0.1, seed)]


@pytest.mark.parametrize("mask", MASKS, ids=["groups", "units"])
@pytest.mark.parametrize(("seed", "name"), [(1, "w"), (2**63, "w"), (0, "v")])
def test_masks_of_other_seeds_and_names_are_independent(mask, seed, name):
    grid, keep = (400, 500), 0.1
    overlap = int((dense(mask(0), grid) * dense(mask(seed), grid, name)).sum())
    # Units of four elements have twice the deviation of single ones.
    assert abs(overlap - keep**2 * math.prod(grid)) < 5 * 2 * keep * math.sqrt(math.prod(grid))


@pytest.mark.parametrize("mask", MASKS, ids=["groups", "units"])
def test_threads_do_not_matter(mask):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(mask(0).positions("w", (300, 600)))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Groups(8, 8, 0),
        lambda: Groups(8, 0, 0),
        lambda: Groups(1, 1, 0),
        lambda: Groups(65537, 1, 0),
        lambda: Groups(8, 1, -1),
        lambda: Units(3, 1, 0.5, 0),
        lambda: Units(0, 2, 0.5, 0),
        lambda: Units(2, 0, 0.5, 0),
        lambda: Units(2, 1025, 0.5, 0),
        lambda: Units(0, 1, 1.0, 0),
        lambda: Units(0, 1, 0.5, 1 << 64),
    ],
)
def test_bad_parameters_are_refused(call):
    with pytest.raises(InputError, match="must be"):
        call()
