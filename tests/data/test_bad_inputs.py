"""Bad inputs of `prepare` and damaged folders: one line that names file, rule and value."""

import json

import numpy as np
import pytest

from spattention.cli import main
from spattention.data import text, training
from spattention.data.arrays import open_array, save_array
from spattention.data.corpus import open_source, prepare_corpus
from spattention.data.prepare import PreparedFolder, open_facts
from spattention.data.text import read_documents
from spattention.data.tokenizer import load_tokenizer, train_tokenizer
from spattention.data.training import open_training

GOOD = "\f".join(f"words of document {k}" for k in range(40))


def write(path, content):
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def vocabulary_of(entries):
    model = {"type": "BPE", "vocab": entries, "merges": []}
    return json.dumps({"version": "1.0", "model": model})


@pytest.mark.parametrize(
    ("name", "content", "options", "error"),
    [
        ("a.txt", b"\xff\xfe\x00", [], "a.txt must be UTF-8 text"),
        ("a.txt", GOOD, ["--vocabulary", "1000000000000"], "`vocabulary` must be at least 257"),
        ("a.txt", GOOD, ["--vocabulary", "-1"], "`vocabulary` must be at least 257"),
        ("a.txt", GOOD, ["--held-out", "nan"], "`--held-out` must lie between 0 and 0.5, got nan"),
        ("a.txt", GOOD, ["--end-of-text", "</s>"], "the tokenizer must have the token </s>"),
        ("a.txt", GOOD, ["--split", "test"], "are for datasets, "),
        ("a.jsonl", "[" * 200_000, [], "a.jsonl, line 1, must be an object"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', [], "line 2: `text` must be a string, got int"),
        ("a.jsonl", '{"text": "a"}\n"x"', [], 'line 2, must be an object with a "text" entry'),
        ("a.jsonl", '{"text": "a"}', ["--column", "body"], 'an object with a "body" entry'),
        ("a.docx", b"PK\x03\x04", [], "a.docx must be text (.txt), JSON lines (.jsonl)"),
        ("a.parquet", b"PAR1 cut off", [], "a.parquet is neither a file nor a dataset that can be"),
    ],
)
def test_prepare_refuses_by_name(tmp_path, capsys, name, content, options, error):
    """By the command: status 2, no traceback, and nothing is left behind."""
    source = write(tmp_path / name, content)
    assert main(["prepare", str(source), "--output", str(tmp_path / "new" / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert error in said, said
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{}", "must be a tokenizer of the `tokenizers` library"),
        ("[" * 100_000, "must be a tokenizer of the `tokenizers` library"),
        (b"\x00\xff", "must be a tokenizer of the `tokenizers` library"),
        (vocabulary_of({"a": 2**32 - 1}), "must number its tokens below 1048576"),
        (vocabulary_of({}), "must number its tokens below 1048576, and have some"),
    ],
)
def test_foreign_tokenizers_are_refused(tmp_path, content, error):
    with pytest.raises(ValueError, match=rf"t\.json {error}"):
        load_tokenizer(write(tmp_path / "t.json", content))


def test_a_huge_tokenizer_is_not_read(tmp_path):
    with (tmp_path / "t.json").open("wb") as file:
        file.truncate(2**40)  # takes no room on disk
    with pytest.raises(ValueError, match="must have at most 268435456 bytes, got 1099511627776"):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match="is not a file"):
        load_tokenizer(tmp_path)


def test_lines_and_documents_have_a_longest_length(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 100)
    monkeypatch.setattr(text, "LONGEST_DOCUMENT", 100)
    monkeypatch.setattr(text, "CHUNK", 7)
    parts = ["x" * 90, "y" * 50, "z"]
    assert read_documents(write(tmp_path / "a.txt", "\f".join(parts))) == parts
    with pytest.raises(ValueError, match=r"a\.txt must have a form feed at least every 100 char"):
        read_documents(write(tmp_path / "a.txt", "z\f" + "x" * 101))
    lines = '{"text": "short"}\n' + json.dumps({"text": "x" * 100})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, must have at most 100 characters"):
        read_documents(write(tmp_path / "a.jsonl", lines))


def test_files_without_permission_are_named(open_folder, unprivileged, capsys):
    source = write(open_folder / "a.txt", GOOD)
    source.chmod(0)
    (open_folder / "locked").mkdir(mode=0o555)
    arguments = ["prepare", str(source), "--output", str(open_folder / "out")]
    with unprivileged():
        assert main(arguments) == 2
        assert "Permission denied" in (said := capsys.readouterr().err)
        assert "a.txt" in said
        assert not (open_folder / "out").exists()
    source.chmod(0o644)
    with unprivileged():
        assert main([*arguments[:-1], str(open_folder / "locked" / "out")]) == 2
        assert "locked" in capsys.readouterr().err


def test_a_folder_under_a_file_is_refused(tmp_path, capsys):
    source = write(tmp_path / "a.txt", GOOD)
    assert main(["prepare", str(source), "--output", str(source / "out")]) == 2
    assert str(source) in capsys.readouterr().err


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, full_disk):
    text = "\f".join(f"{k} {'words ' * 40}" for k in range(400))
    source = open_source(str(write(tmp_path / "a.txt", text)))
    with full_disk(20_000), pytest.raises(OSError, match=r"train\.tokens\.npy cannot be read or w"):
        prepare_corpus(tmp_path / "out", source, vocabulary=300, held_out=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def folder(tmp_path):
    source = open_source(str(write(tmp_path / "a.txt", GOOD)))
    prepare_corpus(tmp_path / "out", source, vocabulary=300, held_out=0.1)
    return tmp_path / "out"


def change(folder, **facts):
    path = folder / "facts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def edit(folder, name, function):
    path = folder / name
    save_array(path, function(np.array(np.load(path))))


def overwritten(value):
    def damage(array):
        array[::7] = value
        return array

    return damage


def sparse_starts(folder):
    """A terabyte of starts that takes no room on disk."""
    path = folder / "train.starts.npy"
    with path.open("wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (2**37,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2**40)


def claims(shape):
    """A header that claims another shape, in the room that the padding leaves."""

    def damage(folder):
        path = folder / "train.tokens.npy"
        header, rest = path.read_bytes()[:128], path.read_bytes()[128:]
        old = f"({len(np.load(path))},)"
        text = header[10:].decode().rstrip().replace(old, shape)
        path.write_bytes(header[:10] + text.ljust(117).encode() + b"\n" + rest)

    return damage


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda d: edit(d, "train.tokens.npy", overwritten(5)), "must have the digest"),
        (lambda d: edit(d, "train.tokens.npy", overwritten(60_000)), "must have the digest"),
        (lambda d: edit(d, "validation.tokens.npy", overwritten(5)), "must have the digest"),
        (lambda d: edit(d, "train.starts.npy", lambda s: s + (s == s[1])), "must have the digest"),
        (lambda d: np.save(d / "train.starts.npy", np.array([0, np.nan])), "one row of int64, got"),
        (lambda d: np.save(d / "train.starts.npy", np.int64(3)), r"int64, got int64 \[\]"),
        (lambda d: np.save(d / "train.starts.npy", np.zeros((2, 2), np.int64)), r"int64 \[2, 2\]"),
        (
            lambda d: np.save(d / "train.tokens.npy", np.array([{}]), allow_pickle=True),
            "must hold one row of uint16 or uint32, got object",
        ),
        (lambda d: write(d / "train.tokens.npy", b""), "must be one row of uint16 or uint32 in"),
        (lambda d: write(d / "train.tokens.npy", b"PK\x03\x04"), "must be one row of uint16"),
        (claims("(10000000000000,)"), "must have 20000000000128 bytes by its header, got"),
        (sparse_starts, "must have at most one start per token and one more, got 137438953472"),
        (claims("(-1,)"), "must have 126 bytes by its header, got"),
        (claims("(9,"), "must be one row of uint16 or uint32 in .npy"),
        (claims("(" * 60), "must be one row of uint16 or uint32 in .npy"),
        (lambda d: (d / "train.tokens.npy").unlink(), "train.tokens.npy must be a file with one"),
        (lambda d: write(d / "facts.json", "[]"), "facts.json must hold a JSON object, got"),
        (lambda d: write(d / "facts.json", "[" * 99_999), "facts.json must hold a JSON object"),
        (lambda d: write(d / "facts.json", b"\xff"), "facts.json must hold a JSON object"),
        (lambda d: write(d / "facts.json", " " * 2**20 + "{}"), "must have at most 1048576 bytes"),
        (lambda d: change(d, train_tokens="many"), "`train_tokens` must be an integer from 0 on"),
        (lambda d: change(d, vocabulary=-1), "`vocabulary` must be an integer from 0 on, got -1"),
        (lambda d: change(d, end_of_text=1.5), "`end_of_text` must be an integer from 0 on, got"),
        (lambda d: change(d, unigram_entropy=float("nan")), "`unigram_entropy` must be a finite"),
        (lambda d: change(d, digest=None), "`digest` must be a string, got None"),
        (lambda d: change(d, digest=""), "must have the digest"),
        (lambda d: change(d, version=2), "facts.json must have the entries"),
        (lambda d: write(d / "tokenizer.json", "{}"), "tokenizer.json must be a tokenizer of the"),
        (
            lambda d: train_tokenizer(["a"], 257).save(str(d / "tokenizer.json")),
            "must hold tokens below 257, the entries of its tokenizer, got",
        ),
    ],
)
def test_damaged_folders_are_not_trained_on(folder, damage, error):
    damage(folder)
    with pytest.raises(ValueError, match=error) as caught:
        open_training([str(folder)], [], context=8)
    assert str(folder) in str(caught.value)


def test_a_file_in_place_of_a_folder_and_the_reverse(folder, tmp_path):
    (folder / "facts.json").unlink()
    (folder / "facts.json").mkdir()
    with pytest.raises(ValueError, match=r"facts\.json must be a file .*, it is a folder"):
        open_facts(folder)
    with pytest.raises(ValueError, match="must be folders that `spattention prepare` wrote"):
        open_training([str(tmp_path / "a.txt")], [], context=8)


def test_the_digest_can_be_left_to_another_process(folder):
    """Of the processes on a node, one compares; sizes are checked by all."""
    edit(folder, "train.tokens.npy", overwritten(5))
    assert len(PreparedFolder(folder).stream("train", check=False)) > 0
    assert open_training([str(folder)], [], context=8, check=False).tokens > 0


def test_a_comparison_of_many_tokens_is_announced(folder, monkeypatch):
    said = []
    open_training([str(folder)], [], context=8, say=said.append)
    assert said == []
    monkeypatch.setattr(training, "LARGE", 10)
    open_training([str(folder)], [], context=8, say=said.append)
    assert said == ["comparing 0.0 GB of tokens with their digests"]


def test_arrays_of_no_tokens_and_their_sizes(tmp_path):
    save_array(tmp_path / "a.npy", np.zeros(0, np.uint16))
    assert open_array(tmp_path / "a.npy", (np.uint16,)).shape == (0,)
    save_array(tmp_path / "a.npy", np.arange(5, dtype=np.uint16))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
