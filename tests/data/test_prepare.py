"""From files of text to streams and a tokenizer."""

import gzip
import json

import numpy as np
import pytest

from spattention.data.prepare import open_stream, prepare
from spattention.data.text import read_documents, sample_path
from spattention.data.token_file import write_token_file
from spattention.data.tokenizer import entries_of, load_tokenizer, tokenize, train_tokenizer
from spattention.data.tokens import TokenStream
from spattention.data.training import open_training

CUT_OFF = gzip.compress(b"some text", mtime=0)[:-6]
WORDS = "the quick brown fox jumps over the lazy dog and the dog sleeps on, naïve as ever\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\f".join(f"Chapter {k}\n{WORDS * 5}" for k in range(10)), encoding="utf-8")
    return path


def test_the_sample_is_four_books_in_chapters():
    documents = read_documents(sample_path())
    assert len(documents) == 12 + 28 + 61 + 12
    assert sum(map(len, documents)) > 1_700_000
    assert documents[1].startswith("CHAPTER II. The Pool of Tears")


def test_text_json_lines_and_folders(text, tmp_path):
    lines = tmp_path / "more.jsonl"
    lines.write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    assert len(read_documents(text)) == 10
    assert read_documents(lines) == ["one", "two"]
    assert len(read_documents(tmp_path)) == 12


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"tex', r"a\.jsonl, line 2, must be an object"),
        ("a.jsonl", b'{"text": 3}', r"line 1: `text` must be a string, got int"),
        ("a.jsonl", b"[1]", r"line 1, must be an object"),
        ("a.jsonl", b'{"text": "\\ud800 x"}', r"line 1 must hold Unicode text"),
        ("a.txt", b" \n ", "must hold text, got none"),
        ("a.txt", b"\xff\xfe\xfa", r"must be UTF-8 text"),
        ("a.u16.xz", b"x", "holds tokens already, which need no preparing"),
        ("a.txt.gz", b"x", r"a\.txt\.gz must be a whole \.gz file: Not a gzipped file"),
        ("a.txt.gz", CUT_OFF, "must be a whole .gz file: Compressed"),
        ("a.txt.gz", gzip.compress(b"\xff\xfe\xfa", mtime=0), "must be UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(b'{"text": 3}', mtime=0), "line 1: `text` must be a string"),
        ("a.pdf.gz", b"x", r"must be text \(\.txt\), JSON lines"),
        ("a.pdf", b"x", r"must be text \(\.txt\), JSON lines"),
    ],
)
def test_unreadable_files(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        read_documents(tmp_path / name)


def test_compressed_text_is_read(tmp_path):
    texts = {"a.txt": "one\ftwo", "b.jsonl": '{"text": "three"}\n'}
    for name, text in texts.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert read_documents(tmp_path / "a.txt.gz") == ["one", "two"]
    assert read_documents(tmp_path) == ["one", "two", "three"]


def test_text_of_zstandard_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "b.jsonl.zst"
    whole = zstandard.compress(b'{"text": "three"}\n' * 9)
    path.write_bytes(whole)
    assert read_documents(path) == ["three"] * 9
    for damaged in (b"x", whole[:-4]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"must be a whole \.zst file|must hold text"):
            read_documents(path)


def test_missing_paths(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"must hold \.txt or \.jsonl files .*, got none"):
        read_documents(tmp_path)


def test_tokens_decode_to_the_text_that_they_came_from():
    tokenizer = train_tokenizer([WORDS], 300)
    stream = tokenize([WORDS, "Ünseen ☃ text"], tokenizer)
    assert stream.num_documents == 2
    assert stream.tokens.dtype == np.uint16
    parts = [tokenizer.decode(stream.take([k]).tokens.tolist()) for k in range(2)]
    assert parts == [WORDS, "Ünseen ☃ text"]


def test_a_vocabulary_smaller_than_the_bytes():
    with pytest.raises(ValueError, match=r"`vocabulary` must be at least 257 .* got 100"):
        train_tokenizer([WORDS], 100)


def test_the_tokenizer_never_sees_held_out_text(text, tmp_path):
    rare = text.read_text(encoding="utf-8").split("\f")
    rare[5] = "zzzz " * 100  # the one that is held out
    text.write_text("\f".join(rare), encoding="utf-8")
    folder = tmp_path / "out"
    facts = prepare(folder, text, vocabulary=300, held_out=0.1)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    train, validation = (open_stream(folder, name) for name in ("train", "validation"))
    assert (facts.train_documents, facts.validation_documents) == (9, 1)
    assert tokenizer.decode(validation.tokens.tolist()) == rare[5]
    assert "zz" not in tokenizer.get_vocab()
    assert len(train) == facts.train_tokens
    assert facts.vocabulary == 320
    assert facts.unigram_entropy == validation.unigram_entropy()
    assert json.loads((folder / "facts.json").read_text())["digest"] == facts.digest


def test_prepare_is_the_same_every_time(text, tmp_path):
    first = prepare(tmp_path / "one", text, vocabulary=300, held_out=0.1)
    assert first == prepare(tmp_path / "two", text, vocabulary=300, held_out=0.1)


def test_packed_tokens_with_and_without_tokenizer(text, tmp_path):
    tokenizer = train_tokenizer([WORDS], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    packed = tmp_path / "t.u16.xz"
    write_token_file(packed, tokenize(read_documents(text), tokenizer), end_of_text=0)
    bare = prepare(tmp_path / "bare", packed, vocabulary=0, held_out=0.1)
    assert (bare.train_documents, bare.tokenizer) == (9, "unknown")
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    known = tmp_path / "tokenizer.json"
    prepare(tmp_path / "known", packed, vocabulary=0, held_out=0.1, tokenizer=known)
    assert (tmp_path / "known" / "tokenizer.json").exists()


def test_packed_tokens_of_another_tokenizer(tmp_path):
    tokenizer = train_tokenizer([WORDS], 260)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    packed = tmp_path / "t.u16.xz"
    rows = [np.array([400, 0], np.uint16)] * 3
    write_token_file(packed, TokenStream.from_documents(rows), end_of_text=0)
    with pytest.raises(ValueError, match="tokenizer's 260 entries, got token 400"):
        prepare(
            tmp_path / "out",
            packed,
            vocabulary=0,
            held_out=0.1,
            tokenizer=tmp_path / "tokenizer.json",
        )


def test_options_that_do_not_go_with_the_data(text, tmp_path):
    with pytest.raises(ValueError, match="`--end-of-text` is only for a token file"):
        prepare(tmp_path / "out", text, vocabulary=300, held_out=0.1, end_of_text=3)
    with pytest.raises(ValueError, match="must be a tokenizer of the `tokenizers` library"):
        prepare(tmp_path / "out", text, vocabulary=300, held_out=0.1, tokenizer=text)


def test_a_tokenizer_whose_ids_have_gaps(text, tmp_path):
    trained = json.loads(train_tokenizer(["words of a text"], 300).to_str())
    trained["model"]["vocab"]["words"] = 70_000
    trained["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(trained))
    gaps = load_tokenizer(tmp_path / "tokenizer.json")
    assert entries_of(gaps) == 70_001 > gaps.get_vocab_size()
    facts = prepare(
        tmp_path / "out",
        text,
        vocabulary=300,
        held_out=0.2,
        tokenizer=tmp_path / "tokenizer.json",
    )
    assert facts.vocabulary >= 70_001
    assert open_stream(tmp_path / "out", "train").tokens.dtype == np.uint32


def test_a_tokenizer_is_read_once(text, tmp_path, monkeypatch):
    """Large ones take seconds; training and validation tokens are compared with the same one."""
    prepare(tmp_path / "out", text, vocabulary=300, held_out=0.1)
    read = []

    def counted(path):
        read.append(path)
        return load_tokenizer(path)

    for module in ("prepare", "training"):
        monkeypatch.setattr(f"spattention.data.{module}.load_tokenizer", counted)
    opened = open_training([str(tmp_path / "out")], [], context=16)
    assert opened.validation is not None
    assert read == [tmp_path / "out" / "tokenizer.json"]
