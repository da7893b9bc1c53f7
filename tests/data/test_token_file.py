"""Token files: round trip, and a clear error for each way to be wrong."""

import json
import lzma
import tracemalloc

import numpy as np
import pytest

from spattention.data.token_file import read_token_file, write_token_file
from spattention.data.tokens import TokenStream

END = 9


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "text.00.u16.xz"
    rows = [np.array([*range(k % 5 + 1), END], np.uint16) for k in range(40)]
    write_token_file(path, TokenStream.from_documents(rows), END)
    return path


def change(path, **facts):
    described = path.with_name("text.00.json")
    described.write_text(json.dumps(json.loads(described.read_text()) | facts))


def test_round_trip(packed):
    found = read_token_file(packed)
    assert found.num_documents == 40
    assert found.tokens[:6].tolist() == [0, END, 0, 1, END, 0]


def test_the_end_of_text_may_be_an_argument(packed):
    change(packed, end_of_text=None)
    assert read_token_file(packed).num_documents == 1
    assert read_token_file(packed, END).num_documents == 40


def test_documents_of_equal_length_need_no_separators(tmp_path):
    path = tmp_path / "long.u16.xz"
    path.write_bytes(lzma.compress(np.arange(30, dtype="<u2").tobytes()))
    (tmp_path / "long.json").write_text('{"docs": 3, "tokens": 30, "eos": 0}')
    assert read_token_file(path).starts.tolist() == [0, 10, 20, 30]


def test_a_truncated_file(packed):
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"truncated or not the file described: it must have \d+"):
        read_token_file(packed)
    change(packed, bytes=packed.stat().st_size)
    with pytest.raises(ValueError, match=r"text\.00\.u16\.xz is truncated or damaged"):
        read_token_file(packed)


def test_a_foreign_file(packed):
    packed.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="must be compressed with xz, got a file of another kind"):
        read_token_file(packed)


def test_a_file_with_half_a_token(packed):
    packed.write_bytes(lzma.compress(b"abc"))
    change(packed, bytes=packed.stat().st_size)
    with pytest.raises(ValueError, match=r"uint16 tokens, got an odd number of bytes \(3\)"):
        read_token_file(packed)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"tokens": 7}, r"`tokens` must be 7, got more"),
        ({"tokens": 161}, r"`tokens` must be 161, got 160"),
        ({"max": 50279}, r"`max` must be 50279, got 9"),
        ({"max": -1}, r"`max` must be an integer from 0 to 65535, got -1"),
        ({"max": True}, r"`max` must be an integer from 0 to 65535, got True"),
        ({"eos": "40"}, r"`eos` must be an integer from 0 to \d+, got '40'"),
        ({"end_of_text": 70_000}, r"`end_of_text` must be an integer from 0 to 65535, got 70000"),
        ({"docs": 0}, r"`docs` must be an integer from 1 to"),
        ({"tokens": 10**40}, r"`tokens` must be an integer from 1 to"),
        ({"tokens": 10**9}, r"`tokens` must be at most 67108864 for a file of \d+ bytes"),
        ({"eos": 39}, r"must hold 39 tokens 9 \(end of text\), got 40"),
        ({"docs": "many"}, r"must give the integers `docs` and `tokens`"),
    ],
)
def test_a_description_that_does_not_agree(packed, facts, text):
    change(packed, **facts)
    with pytest.raises(ValueError, match=text):
        read_token_file(packed)


def test_what_unpacks_to_more_is_read_no_further(tmp_path):
    """A file of 500 KB that unpacks to 2 GB is refused without unpacking it."""
    (tmp_path / "b.u16.xz").write_bytes(lzma.compress(b"\0" * 2**22) * 512)
    (tmp_path / "b.json").write_text('{"docs": 1, "tokens": 10}')
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="`tokens` must be 10, got more"):
            read_token_file(tmp_path / "b.u16.xz")
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_streams_that_follow_each_other_are_one(packed):
    """Xz files may be joined, with zeros between them."""
    raw = lzma.decompress(packed.read_bytes())
    parts = [lzma.compress(raw[:100]), bytes(8), lzma.compress(raw[100:])]
    whole = read_token_file(packed)
    packed.write_bytes(b"".join(parts))
    change(packed, bytes=packed.stat().st_size)
    np.testing.assert_array_equal(read_token_file(packed).tokens, whole.tokens)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, "\xff", '{"docs": 1}'])
def test_foreign_descriptions(packed, content):
    packed.with_name("text.00.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"text\.00\.json must (hold a JSON object|give the)"):
        read_token_file(packed)


def test_missing_files(packed):
    with pytest.raises(ValueError, match=r"other\.json is missing"):
        read_token_file(packed.with_name("other.u16.xz"))
    packed.unlink()
    with pytest.raises(ValueError, match="is not a file"):
        read_token_file(packed)


def test_writing_refuses(tmp_path):
    stream = TokenStream.from_documents([np.array([70_000], np.uint32)])
    with pytest.raises(ValueError, match="tokens below 65536, got 70000"):
        write_token_file(tmp_path / "a.u16.xz", stream, END)
    with pytest.raises(ValueError, match=r"must end with \.u16\.xz, got a\.xz"):
        write_token_file(tmp_path / "a.xz", stream, END)


def test_the_former_module_names_the_same():
    """Scripts that import `spattention.data.packed` keep working."""
    from spattention.data import packed, token_file

    assert packed.read_packed is token_file.read_token_file
    assert packed.write_packed is token_file.write_token_file
