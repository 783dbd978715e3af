"""What becomes of an error that a cross-entropy meets after its arguments were looked at: on a GPU
a class index out of range is reported late, by any call. No GPU is needed to see how it is told."""

from __future__ import annotations

import pytest

from torchbp.functions.softmax_ce import raise_late

FOUND = "target wants class indices from 0 to 9 (or ignore_index -100), got 10 at position 3"


@pytest.mark.parametrize("before", ["", "torchbp::softmax_ce: "])
@pytest.mark.parametrize("after", ["", "\nException raised from somewhere"])
def test_an_index_out_of_range_is_an_index_error(before: str, after: str) -> None:
    with pytest.raises(IndexError) as raised:
        raise_late(RuntimeError(before + FOUND + after))
    assert str(raised.value) == f"cross_entropy: {FOUND}"


def test_any_other_error_is_itself() -> None:
    other = RuntimeError("out of memory")
    with pytest.raises(RuntimeError) as raised:
        raise_late(other)
    assert raised.value is other
