"""Streams that are tokenized again, with a tokenizer that is trained on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.experiments import vocabulary
from spattention.data.token_file import described_end_of_text, read_token_file, write_token_file
from spattention.data.tokenizer import (
    end_of_text_id,
    entries_of,
    load_tokenizer,
    save_tokenizer,
    tokenize,
    train_tokenizer,
)

TEXTS = {
    "books": ["It was a bright cold day in April. " * 40, "A second book, of other words! " * 30],
    "val_books": ["It was a held-out day. " * 20],
}


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two streams and their tokenizer."""
    folder = tmp_path_factory.mktemp("streams")
    old = train_tokenizer([*TEXTS["books"], *TEXTS["val_books"]], 280)
    save_tokenizer(old, folder / "tokenizer_olmo.json")
    for name, texts in TEXTS.items():
        write_token_file(folder / f"{name}.u16.xz", tokenize(texts, old), end_of_text_id(old))
    return folder


def options(data: Path, output: Path, **more: object) -> vocabulary.Options:
    return vocabulary.Options(data, output, vocabulary=300, processes=1, **more)  # type: ignore[arg-type]


def test_streams_hold_the_same_text_in_new_tokens(streams: Path, tmp_path: Path) -> None:
    """Every document comes back, and the end of text stands at its end alone."""
    vocabulary.main(options(streams, tmp_path))
    new = load_tokenizer(tmp_path / "tokenizer.json")
    assert entries_of(new) <= 300
    for name, texts in TEXTS.items():
        path = tmp_path / f"{name}.u16.xz"
        stream = read_token_file(path)
        assert described_end_of_text(path) == end_of_text_id(new)
        assert stream.num_documents == len(texts)
        for k, text in enumerate(texts):
            ids = stream.tokens[stream.starts[k] : stream.starts[k + 1]].tolist()
            assert ids[-1] == end_of_text_id(new)
            assert end_of_text_id(new) not in ids[:-1]
            assert new.decode(ids) == text
    facts = json.loads((tmp_path / "vocabulary.json").read_text())
    assert set(facts["streams"]) == set(TEXTS)
    assert facts["streams"]["books"]["documents"] == 2


def test_a_long_document_keeps_its_text(
    streams: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document that is encoded in pieces is one document."""
    vocabulary.main(options(streams, tmp_path))
    monkeypatch.setattr(vocabulary, "PIECE", 7)
    (tmp_path / "books.u16.xz").unlink()
    vocabulary.encode(options(streams, tmp_path), "books")
    stream, new = (
        read_token_file(tmp_path / "books.u16.xz"),
        load_tokenizer(tmp_path / "tokenizer.json"),
    )
    assert stream.num_documents == 2
    assert new.decode(stream.tokens[: stream.starts[1]].tolist()) == TEXTS["books"][0]


def test_the_tokenizer_never_sees_held_out_text(streams: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`--streams` must have one to train on"):
        vocabulary.main(options(streams, tmp_path / "one", streams=("val_books",)))
    with pytest.raises(ValueError, match=r"`--data` must be a folder of streams"):
        vocabulary.main(options(tmp_path, tmp_path / "two"))


def test_a_seed_gives_one_tokenizer(streams: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        vocabulary.main(options(streams, tmp_path / name, streams=("books",)))
    one, two = ((tmp_path / n / "tokenizer.json").read_text() for n in ("one", "two"))
    assert one == two
