"""Stop strings and held-back text, for every way of cutting a text into tokens."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupaged.engine.output_text import OutputText


class PieceDecoder:
    """Token i is piece i; `last` is what an unfinished character becomes at the end."""

    def __init__(self, pieces, last=""):
        self.pieces, self.last = pieces, last

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return self.last


def feed(pieces, stop, include_stop=False, last="", min_tokens=0):
    """(the text after each token and at the end, the stop string found)"""
    output = OutputText(PieceDecoder(pieces, last), stop, include_stop, min_tokens)
    shown = []
    for token_id in range(len(pieces)):
        found = output.push(token_id)
        shown.append(output.text)
        if found is not None:
            return shown, found
    found = output.flush()
    return [*shown, output.text], found


def by_characters(text, stop, include_stop=False, num_exempt=0):
    """The specification: look at the text after each character but the first num_exempt; (text, stop string)."""
    for end in range(num_exempt + 1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            found = max(ending, key=len)
            return text[: end if include_stop else end - len(found)], found
    return text, None


def splits(text):
    for borders in itertools.product([False, True], repeat=len(text) - 1):
        pieces, start = [], 0
        for i, border in enumerate(borders, 1):
            if border:
                pieces.append(text[start:i])
                start = i
        yield [*pieces, text[start:]]


@given(st.lists(st.text("ab", max_size=3), max_size=8), st.sampled_from([(), ("ba",)]), st.data())
def test_what_is_taken_joins_to_the_text(pieces, stop, data):
    shown, found = feed(pieces, stop, last="c")
    output, taken = OutputText(PieceDecoder(pieces, last="c"), stop), ""
    for token_id, text in enumerate(shown[: len(shown) - (found is None)]):
        output.push(token_id)
        if data.draw(st.booleans()):
            assert taken + output.text == text
        if data.draw(st.booleans()):
            taken += output.take()
            assert taken == text
    if found is None:
        output.flush()
    assert taken + output.take() == shown[-1]
    assert output.take() == output.text == ""


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("one STOP two", ("STOP",)),
        ("aababab!", ("abab",)),  # a failed beginning overlaps the match
        ("xabcabd", ("abcabx", "abd")),  # one dies, another begins inside it
        ("xabcd", ("bc", "abcd")),  # the one that ends first wins
        ("xabc", ("bc", "abc")),  # both end there: the longest
        ("..\n\nQ", ("\n\n",)),
        ("nothing", ("zzz",)),
        ("endin", ("ending",)),  # a beginning at the very end is no match
    ],
)
def test_every_split_gives_the_same_text(text, stop, include_stop):
    expected, stop_string = by_characters(text, stop, include_stop)
    for pieces in splits(text):
        shown, found = feed(pieces, stop, include_stop)
        assert (shown[-1], found) == (expected, stop_string), pieces


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_any_text_any_split_nothing_early_and_nothing_late(text, stop, data):
    borders = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *borders, len(text)])]
    stop = tuple(stop)
    expected, stop_string = by_characters(text, stop)
    shown, found = feed(pieces, stop)
    assert (shown[-1], found) == (expected, stop_string)

    arrived = ""
    for piece, visible in zip(pieces, shown[: len(shown) - (found is None)], strict=False):
        arrived += piece
        assert expected.startswith(visible)  # nothing is shown that is taken back
        if by_characters(arrived, stop)[1] is None:
            held = arrived[len(visible) :]
            beginnings = {s[:n] for s in stop for n in range(1, len(s))}
            longest = max((n for n in range(len(arrived) + 1) if arrived[len(arrived) - n :] in beginnings), default=0)
            assert len(held) == longest  # and no more is withheld than may still become a stop string


@given(
    st.lists(st.text("ab", max_size=3), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(0, 9),
    st.booleans(),
)
def test_stop_strings_that_end_within_the_first_tokens_do_not_count(pieces, stop, min_tokens, include_stop):
    text, num_exempt = "".join(pieces), len("".join(pieces[:min_tokens]))
    expected, stop_string = by_characters(text, tuple(stop), include_stop, num_exempt)
    shown, found = feed(pieces, tuple(stop), include_stop, min_tokens=min_tokens)
    assert (shown[-1], found) == (expected, stop_string)


def test_the_last_bytes_of_the_first_tokens_do_not_count_either():
    assert feed(["a", "b"], ("b\ufffd",), last="\ufffd", min_tokens=2) == (["a", "a", "ab\ufffd"], None)


def test_text_without_stop_strings_passes_through():
    assert feed(["a", "", "b"], ()) == (["a", "a", "ab", "ab"], None)


def test_the_last_bytes_may_complete_a_stop_string():
    shown, found = feed(["a", "b"], ("b\ufffd",), last="\ufffd")
    assert (shown[-1], found) == ("a", "b\ufffd")


def test_flush_shows_what_was_held_back():
    output = OutputText(PieceDecoder(["ab", "S"]), ("STOP",))
    output.push(0)
    output.push(1)
    assert output.text == "ab"
    assert output.flush() is None
    assert output.text == "abS"
