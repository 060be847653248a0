from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.requests.bank import Residuals
from runtime.routing.policy import EMPTY

ROWS = 3
operation = st.tuples(st.sampled_from(["keep", "reuse", "clear"]), st.sets(st.integers(0, ROWS - 1), min_size=1))


def states(seed: int, rows: int = ROWS) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, 2, generator=draw), torch.randn(5, rows, generator=draw)]


DIMS = (0, 1)


def part(tensors: list[torch.Tensor], rows: list[int]) -> list[torch.Tensor]:
    return [t.index_select(d, torch.tensor(rows)) for t, d in zip(tensors, DIMS, strict=True)]


def test_a_bank_filled_in_inference_mode_is_written_outside_of_it() -> None:
    for rows in ([0, 1, 2], [0, 2]):
        bank, index = Residuals(states(0), DIMS), torch.tensor(rows)
        some = () if len(rows) == ROWS else (rows, index)
        with torch.inference_mode():
            bank.keep(part(states(0), rows), part(states(1), rows), *some)
        bank.keep(part(states(2), rows), part(states(3), rows), *some)
        got = bank.reuse(part(states(2), rows), rows, index)
        for have, want in zip(got, part(states(3), rows), strict=True):
            torch.testing.assert_close(have, want)


@settings(max_examples=60, deadline=None)
@given(st.lists(operation, max_size=12))
def test_a_bank_is_a_residual_and_a_count_per_row(operations) -> None:
    bank = Residuals(states(0), DIMS)
    model: dict[int, tuple[list[torch.Tensor], int]] = {}
    for seed, (kind, chosen) in enumerate(operations):
        rows = sorted(chosen)
        whole = len(rows) == ROWS
        index = torch.tensor(rows)
        before, after = states(2 * seed), states(2 * seed + 1)
        if kind == "keep":
            if whole:
                bank.keep(before, after)
            else:
                bank.keep(part(before, rows), part(after, rows), rows, index)
            for row in rows:
                model[row] = (
                    [y - x for x, y in zip(part(before, [row]), part(after, [row]), strict=True)],
                    0,
                )
        elif kind == "clear":
            bank.clear(None if whole else rows)
            for row in rows:
                model.pop(row, None)
        elif all(row in model for row in rows):
            got = bank.reuse(before) if whole else bank.reuse(part(before, rows), rows, index)
            for place, row in enumerate(rows):
                deltas, k = model[row]
                model[row] = (deltas, k + 1)
                mine = [t.index_select(d, torch.tensor([place])) for t, d in zip(got, DIMS, strict=True)]
                for have, x, delta in zip(mine, part(before, [row]), deltas, strict=True):
                    torch.testing.assert_close(have, x + delta)
        assert bank.held == [model[row][1] if row in model else EMPTY for row in range(ROWS)]


def test_buffers_are_written_again_after_clearing() -> None:
    bank = Residuals(states(0), DIMS)
    bank.keep(states(0), states(1))
    size, addresses = bank.nbytes, [d.data_ptr() for d in bank.deltas]
    bank.clear()
    bank.keep(states(2), states(3))
    assert [d.data_ptr() for d in bank.deltas] == addresses
    assert bank.nbytes == size == sum(s.nbytes for s in states(0))


def test_a_bank_holds_differences_of_its_own() -> None:
    bank = Residuals(states(0), DIMS)
    before, after = states(0), states(1)
    bank.keep(before, after)
    expected = [x + (y - x) for x, y in zip(before, after, strict=True)]
    given = [x.clone() for x in before]
    before[0].zero_(), after[0].zero_()
    for have, want in zip(bank.reuse(given), expected, strict=True):
        torch.testing.assert_close(have, want)


def test_a_bank_is_for_states_of_one_kind() -> None:
    bank = Residuals(states(0), DIMS)
    assert bank.fits(states(1))
    assert not bank.fits(states(1, rows=2))
    assert not bank.fits([state.double() for state in states(1)])
