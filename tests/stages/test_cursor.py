"""Numbers of variable length, and a reader that stays inside its bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.stages.cursor import Cursor, varint


@given(st.integers(0, 2**63 - 1))
def test_varints_round_trip_in_their_shortest_spelling(value):
    spelled = varint(value)
    cursor = Cursor(spelled)
    assert cursor.varint() == value
    assert cursor.left == 0
    assert len(spelled) == max(1, -(-value.bit_length() // 7))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "ends after 0 of 1 bytes"),
        (b"\x80", "ends after 0 of 1 bytes"),
        (b"\x80\0", "more bytes than it needs"),
        (b"\xff" * 9 + b"\1", "longer than 63 bits"),
    ],
)
def test_bad_varints_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        Cursor(raw).varint()


def test_a_list_is_refused_before_it_is_read():
    """A count is checked against the bytes left: a short file cannot ask for a long list."""
    with pytest.raises(ValueError, match="a list has 4 items where 3 are the most"):
        Cursor(b"\4\1\1\1").sequence(lambda: pytest.fail("read"))
    with pytest.raises(ValueError, match="a list has 3 items where 2 are the most"):
        Cursor(b"\3\1\1\1").sequence(lambda: pytest.fail("read"), limit=2)


def test_a_reference_must_be_there():
    assert Cursor(b"\1").choose(["a", "b"]) == "b"
    with pytest.raises(ValueError, match="item 2 of a list of 2"):
        Cursor(b"\2").choose(["a", "b"])


def test_the_message_says_what_ended():
    with pytest.raises(ValueError, match="the manifest ends after 2 of 3 bytes"):
        Cursor(b"ab", "manifest").take(3)
