"""Corpora of any size: the same tokens as a plain reading, all or nothing, from every source."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models

from spattention.cli import main
from spattention.data.corpus import BATCH, Source, open_source, prepare_corpus
from spattention.data.prepare import open_facts, open_stream
from spattention.data.text import read_documents
from spattention.data.tokenizer import (
    end_of_text_id,
    find_tokenizer,
    load_tokenizer,
    tokenize,
    train_tokenizer,
)

WORDS = ["one", "two", "three", "four", "naïve"]


def documents(count=60):
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, random.integers(3, 40))) for _ in range(count)]


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(documents(), 300).save(str(path))
    return path


def test_a_corpus_has_the_tokens_of_a_plain_reading(tmp_path, tokenizer):
    texts = documents(2 * BATCH + 7)  # more than one batch
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    seen = []
    facts = prepare_corpus(
        tmp_path / "out",
        open_source(str(source)),
        tokenizer=tokenizer,
        held_out=0.1,
        on_progress=lambda *counts: seen.append(counts),
    )
    train, validation = (open_stream(tmp_path / "out", name) for name in ("train", "validation"))
    whole = tokenize(texts, load_tokenizer(tokenizer))
    held = [k for k in range(len(texts)) if k % 10 == 5]
    rest = [k for k in range(len(texts)) if k % 10 != 5]
    np.testing.assert_array_equal(train.tokens, whole.take(rest).tokens)
    np.testing.assert_array_equal(train.starts, whole.take(rest).starts)
    np.testing.assert_array_equal(validation.tokens, whole.take(held).tokens)
    assert isinstance(train.tokens, np.memmap)
    assert facts == open_facts(tmp_path / "out")
    assert facts.digest == f"{train.digest()[:16]}-{validation.digest()[:16]}"
    assert facts.unigram_entropy == validation.unigram_entropy()
    assert facts.end_of_text == train.tokens[-1]
    assert seen[-1] == (len(texts), len(whole))


def test_every_source_gives_the_same_documents(tmp_path):
    texts = documents(20)
    (tmp_path / "a.txt").write_text("\f".join(texts))
    data = Dataset.from_dict({"text": texts, "other": list(range(20))})
    data.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(str(tmp_path / "splits"))
    data.to_parquet(str(tmp_path / "a.parquet"))
    for what in ("a.txt", "saved", "splits", "a.parquet"):
        assert list(open_source(str(tmp_path / what)).documents) == texts, what
    assert list(open_source(str(tmp_path / "splits"), split="test").documents) == [texts[3]]
    assert open_source(str(tmp_path / "saved")).total == 20
    with pytest.raises(
        ValueError, match=r"`--column` must be one of \['text', 'other'\], got 'body'"
    ):
        open_source(str(tmp_path / "saved"), column="body")
    with pytest.raises(ValueError, match="is neither a file nor a folder"):
        open_source(str(tmp_path / "nothing"))


def test_rows_without_text_are_dropped(tmp_path, tokenizer):
    Dataset.from_dict({"text": ["one", None, "two"], "number": [1, 2, 3]}).to_parquet(
        str(tmp_path / "a.parquet")
    )
    assert list(open_source(str(tmp_path / "a.parquet")).documents) == ["one", "", "two"]
    facts = prepare_corpus(
        tmp_path / "out",
        open_source(str(tmp_path / "a.parquet")),
        tokenizer=tokenizer,
        held_out=0.5,
    )
    assert facts.train_documents + facts.validation_documents == 2
    with pytest.raises(ValueError, match="row 0: `number` must be a string, got int"):
        list(open_source(str(tmp_path / "a.parquet"), column="number").documents)
    lines = tmp_path / "b.jsonl"
    lines.write_text('\ufeff{"text": "url", "content": "words"}\n', encoding="utf-8")
    assert list(open_source(str(lines)).documents) == ["url"]
    assert list(open_source(str(lines), column="content").documents) == ["words"]
    with pytest.raises(ValueError, match='an object with a "body" entry'):
        list(open_source(str(lines), column="body").documents)


def test_truncation_and_padding_leave_documents_whole(tmp_path, tokenizer):
    texts = documents(30)
    cutting = load_tokenizer(tokenizer)
    cutting.enable_truncation(4)
    cutting.enable_padding(length=8)
    cutting.save(str(tmp_path / "cutting.json"))
    expected = tokenize(texts, load_tokenizer(tokenizer))
    found = tokenize(texts, load_tokenizer(tmp_path / "cutting.json"))
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_a_failure_leaves_nothing_behind(tmp_path, tokenizer):
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "one"}\n' * (BATCH + 1) + "{")
    with pytest.raises(ValueError, match=f"line {BATCH + 2}, must be an object"):
        prepare_corpus(tmp_path / "out", open_source(str(source)), tokenizer=tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.jsonl", "tokenizer.json"]


@pytest.mark.parametrize(
    ("share", "count", "held"),
    [
        (0.4, 10, [1, 3, 6, 8]),
        (0.35, 20, [1, 4, 7, 10, 12, 15, 18]),
        (0.5, 2, [1]),
        (0.25, 3, [2]),
        (0.1, 30, [5, 15, 25]),
    ],
)
def test_documents_are_held_out_evenly(tmp_path, tokenizer, share, count, held):
    (tmp_path / "a.txt").write_text("\f".join(f"number {k}" for k in range(count)))
    source = open_source(str(tmp_path / "a.txt"))
    prepare_corpus(tmp_path / "out", source, tokenizer=tokenizer, held_out=share)
    used = load_tokenizer(tokenizer)
    for name in ("train", "validation"):
        stream = open_stream(tmp_path / "out", name)
        texts = [used.decode(stream.take([k]).tokens.tolist()) for k in range(stream.num_documents)]
        expected = [k for k in range(count) if (k in held) == (name == "validation")]
        assert [int(text.split()[-1]) for text in texts] == expected


def test_two_that_prepare_one_folder_do_not_meet(tmp_path, tokenizer):
    def unread():
        raise AssertionError("refused before a tokenizer is trained")
        yield

    def meanwhile():
        yield "one"
        with pytest.raises(ValueError, match="by one process at a time"):
            prepare_corpus(tmp_path / "out", Source("other", unread()))
        yield "three"

    source = Source("first", meanwhile())
    facts = prepare_corpus(tmp_path / "out", source, tokenizer=tokenizer, held_out=0.0)
    assert facts.train_documents == 2


def test_options_of_datasets_are_not_ignored_for_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for changes in ({"name": "en"}, {"split": "test"}, {"streaming": True}):
        for source in (tmp_path / "a.txt", tmp_path):
            with pytest.raises(ValueError, match=r"are for datasets, .* holds text"):
                open_source(str(source), **changes)


@pytest.mark.parametrize(
    ("text", "changes", "error"),
    [
        ("one", {}, "one document must have the end of a line near its end"),
        ("a\fb\fc", {}, r"or more than 1 / 6, such as 0\.18, for a source of 3 documents"),
        ("one", {"held_out": 0.7}, "`--held-out` must lie between 0 and 0.5, got 0.7"),
        ("one", {"end_of_text": "</s>"}, "must have the token </s>"),
    ],
)
def test_what_cannot_be_prepared(tmp_path, tokenizer, text, changes, error):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=error):
        prepare_corpus(
            tmp_path / "out", open_source(str(tmp_path / "a.txt")), tokenizer=tokenizer, **changes
        )
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\f".join(documents(300)))
    arguments = ["prepare", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--vocabulary", "280"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    facts = open_facts(tmp_path / "out")
    assert f"{facts.train_tokens:,} training tokens in 299" in shown
    assert f"must be at most {facts.validation_tokens}. A larger `--held-out` keeps more." in shown
    assert len(read_documents(tmp_path / "a.txt")) == 300 == facts.train_documents + 1
    assert main(arguments) == 2
    assert "must be a new folder" in capsys.readouterr().err


def test_too_few_documents_are_told_before_tokenizing(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one\ftwo")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"text": "two"}\n')
    (tmp_path / "f").mkdir()
    shutil.copy(tmp_path / "a.txt", tmp_path / "f")
    done = []
    for name, said in (
        ("a.txt", "of 2 documents, got 0.1; a form feed ends a document in a .txt file"),
        ("f", "of 2 documents, got 0.1; a form feed ends a document in a .txt file"),
        ("a.jsonl", "of 2 documents, got 0.1$"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare_corpus(
                tmp_path / "out",
                open_source(str(tmp_path / name)),
                tokenizer=tokenizer,
                held_out=0.1,
                on_progress=lambda *count: done.append(count),
            )
    assert not done
    source = Source("six", ["a", "b", "c", " ", "d", "e", "f"])  # just enough
    facts = prepare_corpus(tmp_path / "out", source, tokenizer=tokenizer, held_out=0.1)
    assert (facts.train_documents, facts.validation_documents) == (5, 1)


def test_a_single_document_is_cut_at_a_line(tmp_path, tokenizer):
    """Its end is the validation text: a book in one file needs no form feeds."""
    lines = [f"line {k:02} of a book\n" for k in range(100)]
    (tmp_path / "book.txt").write_text("".join(lines))
    source = open_source(str(tmp_path / "book.txt"))
    prepare_corpus(tmp_path / "out", source, tokenizer=tokenizer, held_out=0.1)
    used = load_tokenizer(tokenizer)
    found = [
        used.decode(open_stream(tmp_path / "out", name).tokens.tolist())
        for name in ("train", "validation")
    ]
    assert found == ["".join(lines[:91]), "".join(lines[91:])]


def test_a_tokenizer_by_file_folder_or_name(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"a folder with a tokenizer\.json, .*model has none"):
        find_tokenizer(str(folder))
    shutil.copy(tokenizer, folder)
    assert find_tokenizer(str(folder)) == folder / "tokenizer.json"
    assert find_tokenizer(str(tokenizer)) == tokenizer

    def download(repo, name):
        if repo != "owner/name":
            raise OSError("404\nmore")
        assert name == "tokenizer.json"
        return str(tokenizer)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_tokenizer("owner/name") == tokenizer
    with pytest.raises(ValueError, match=r"or a model on the hub that has one, got gpt2: 404$"):
        find_tokenizer("gpt2")


@pytest.mark.parametrize(
    "name", ["{folder}/tokeniser.json", "./gone", "a/b/c", "gone.json", "~/gone", "my tokenizer"]
)
def test_a_path_that_is_none_is_not_asked_of_the_hub(tmp_path, tokenizer, name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(ValueError, match=r"`--tokenizer` must be .* is neither a file nor a fold"):
        find_tokenizer(name.format(folder=tmp_path))


def test_a_folder_without_validation_says_so(tmp_path, tokenizer):
    source = Source("one", ["a long text"])
    prepare_corpus(tmp_path / "out", source, tokenizer=tokenizer, held_out=0.0)
    assert len(open_stream(tmp_path / "out", "train"))
    with pytest.raises(ValueError, match=r"out must hold validation tokens, but none were held"):
        open_stream(tmp_path / "out", "validation")


def test_another_end_of_text_is_suggested(tmp_path):
    """As of a Llama's tokenizer, which has no `<|endoftext|>`."""
    own = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1}, merges=[]))
    with pytest.raises(
        ValueError,
        match=r"it has not; `prepare` takes another with `--end-of-text`, such as '</s>'$",
    ):
        end_of_text_id(own)
    assert end_of_text_id(own, "</s>") == 0
