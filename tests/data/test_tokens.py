"""Streams of tokens: documents, split, entropy, windows."""

import math

import numpy as np
import pytest

from spattention.data.tokens import TokenStream, Windows


def stream(*lengths):
    count = 0
    documents = []
    for length in lengths:
        documents.append(np.arange(count, count + length, dtype=np.uint16))
        count += length
    return TokenStream.from_documents(documents)


def test_empty_documents_are_dropped():
    found = stream(3, 0, 2)
    assert found.tokens.tolist() == [0, 1, 2, 3, 4]
    assert found.starts.tolist() == [0, 3, 5]
    assert found.take([1]).tokens.tolist() == [3, 4]


@pytest.mark.parametrize("count", [2, 3, 9, 10, 11, 100, 113])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_held_out_documents_are_whole_and_apart(count, fraction):
    whole = stream(*(k % 7 + 1 for k in range(count)))
    train, validation = whole.hold_out(fraction)
    assert sorted([*train.tokens, *validation.tokens]) == whole.tokens.tolist()
    assert train.num_documents + validation.num_documents == count
    assert validation.num_documents == max(1, round(count * fraction))
    firsts = set(whole.tokens[whole.starts[:-1]].tolist())
    assert {int(validation.tokens[s]) for s in validation.starts[:-1]} <= firsts


def test_a_single_document_is_cut_near_its_end():
    train, validation = stream(20).hold_out(0.1)
    assert (len(train), len(validation)) == (18, 2)


def test_unigram_entropy_of_even_and_of_certain_tokens():
    assert stream(16).unigram_entropy() == pytest.approx(math.log(16))
    assert TokenStream.from_documents([np.zeros(9, np.uint16)]).unigram_entropy() == 0


def test_the_digest_sees_tokens_and_boundaries():
    assert stream(3, 2).digest() == stream(3, 2).digest()
    assert stream(3, 2).digest() != stream(2, 3).digest()
    assert stream(3, 2).digest() != stream(3, 3).digest()


def test_windows_cover_the_stream_without_overlap():
    windows = Windows(stream(7, 6), 4)
    assert len(windows) == 3
    assert [w for k in range(3) for w in windows[k]["input_ids"].tolist()] == list(range(12))
    assert windows[1]["labels"].tolist() == [4, 5, 6, 7]


def test_limited_windows_are_spread_over_the_stream():
    windows = Windows(stream(80), 4, limit=4)
    assert [int(windows[k]["input_ids"][0]) for k in range(4)] == [0, 20, 40, 60]
    assert windows.used().tokens.tolist() == [t + k for t in (0, 20, 40, 60) for k in range(4)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1,), "`context` must be at least 2 tokens, got 1"),
        ((14,), "`context` must be at most the 13 tokens of the text, got 14"),
        ((4, 0), "`limit` must be at least 1 window, got 0"),
    ],
)
def test_windows_refuse(arguments, text):
    with pytest.raises(ValueError, match=text):
        Windows(stream(13), *arguments)


def test_streams_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="uint16 or uint32, got float64"):
        TokenStream(np.zeros(3), np.array([0, 3]))
    with pytest.raises(ValueError, match="from 0 to the 3 tokens"):
        TokenStream(np.zeros(3, np.uint16), np.array([0, 2]))
    with pytest.raises(ValueError, match="at least one token"):
        TokenStream.from_documents([])
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        stream(3, 2).hold_out(1)
