"""What a recipe reads: a fixed order, documents apart, and files that are refused in time."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

from spattention.data.corpus import open_source, prepare_corpus
from spattention.data.prepare import open_stream
from spattention.data.token_file import write_token_file
from spattention.data.tokenizer import load_tokenizer
from spattention.data.tokens import InOrder, TokenStream, Windows
from spattention.data.training import open_training

END = 7


def stream(*lengths):
    """Documents of these lengths, the tokens all different but for the end of each."""
    counter = iter(range(100, 60000))
    documents = [[*(next(counter) for _ in range(n - 1)), END] for n in lengths]
    return TokenStream.from_documents([np.array(d, np.uint16) for d in documents])


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "a.u16.xz"
    write_token_file(path, stream(*[40] * 20), END)
    return path


def test_each_epoch_has_every_item_in_its_own_order():
    order = InOrder(list(range(50)), 125, seed=3)
    items = [order[k] for k in range(125)]
    assert sorted(items[:50]) == sorted(items[50:100]) == list(range(50))
    assert items[:50] != items[50:100] != list(range(50))
    assert items == [
        InOrder(list(range(50)), 1000, seed=3)[k] for k in range(125)
    ]  # not its length
    assert items != [InOrder(list(range(50)), 125, seed=4)[k] for k in range(125)]
    assert order[3] == items[3], "reading back in an earlier epoch"
    with pytest.raises(IndexError):
        order[125]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_order(workers):
    order = InOrder(torch.arange(30), 70, seed=0)
    loader = DataLoader(order, 5, sampler=SequentialSampler(order), num_workers=workers)
    assert torch.cat(list(loader)).tolist() == [int(order[k]) for k in range(70)]


def test_documents_that_are_kept_apart():
    windows = Windows(stream(5, 9, 2, 20), 8, across_documents=False)
    first, second = windows[0], windows[1]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    # Counted from the window's start: the document's first part is in the window before.
    assert second["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert (first["labels"] == -100).nonzero().flatten().tolist() == [0, 5]
    kept = first["labels"] != -100
    assert torch.equal(first["labels"][kept], first["input_ids"][kept])
    assert "position_ids" not in Windows(windows.stream, 8)[0]


def test_streams_and_folders_together(tmp_path, packed):
    (tmp_path / "text.txt").write_text("\f".join(f"text {k} of words " * 9 for k in range(40)))
    source = open_source(str(tmp_path / "text.txt"))
    facts = prepare_corpus(tmp_path / "folder", source, vocabulary=280, held_out=0.1)
    names = [str(packed), str(tmp_path / "folder")]
    with pytest.raises(ValueError, match=r"must agree on the token that ends a document, got"):
        open_training(names, [], context=16)
    data = open_training(names[1:], [], context=16, limit=3)
    assert data.tokens == facts.train_tokens
    tokenizer = load_tokenizer(tmp_path / "folder" / "tokenizer.json")
    assert data.largest == tokenizer.get_vocab_size() - 1 < facts.vocabulary - 1  # rounded up
    assert data.end_of_text == facts.end_of_text
    assert len(data.validation) == 3
    alone = open_training(names[:1], [], context=16, held_out=0.1)
    assert alone.tokens == 18 * 40
    assert alone.largest == 100 + 20 * 39 - 1
    assert alone.end_of_text == END
    other = open_training(names[:1], names[:1], context=16)
    assert other.tokens == 20 * 40
    assert other.digest != alone.digest
    assert open_training(names[:1], names[:1], context=16).digest == other.digest


def test_tokens_of_two_tokenizers_are_not_mixed(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(
            "\f".join(f"{name} {k} of words " * 9 for k in range(40))
        )
        source = open_source(str(tmp_path / f"{name}.txt"))
        prepare_corpus(tmp_path / name, source, vocabulary=280, held_out=0.1)
    names = [str(tmp_path / name) for name in ("one", "two")]
    for data, validation in ((names, []), (names[:1], names[1:])):
        with pytest.raises(ValueError, match="must be made with one tokenizer"):
            open_training(data, validation, context=16)


def test_as_many_windows_are_judged_as_asked(tmp_path, packed):
    for limit, streams, expected in ((1, 1, 1), (5, 3, 5), (2, 3, 3)):
        data = open_training([str(packed)], [str(packed)] * streams, context=16, limit=limit)
        assert len(data.validation) == expected


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_damaged_and_foreign_data_is_refused(tmp_path, packed):
    (tmp_path / "text.txt").write_text("\f".join(f"text {k} of words" for k in range(40)))
    folder = tmp_path / "folder"
    prepare_corpus(folder, open_source(str(tmp_path / "text.txt")), vocabulary=280, held_out=0.1)
    cases = [
        (packed, lambda: _shorten(packed), "truncated"),
        (folder, lambda: _shorten(folder / "train.tokens.npy"), r"must have \d+ bytes by"),
        (folder, lambda: np.save(folder / "train.tokens.npy", np.zeros(9)), "must hold one row of"),
        (folder, lambda: (folder / "facts.json").write_text("{}"), "folder that `prepare` wrote"),
        (tmp_path / "x.bin", lambda: None, "must be folders that `spattention prepare` wrote"),
    ]
    for path, damage, error in cases:
        damage()
        with pytest.raises(ValueError, match=error):
            open_training([str(path)], [], context=16)


def test_a_folder_whose_stream_was_exchanged(tmp_path):
    (tmp_path / "text.txt").write_text("\f".join(f"text {k} of words" for k in range(40)))
    folder = tmp_path / "folder"
    prepare_corpus(folder, open_source(str(tmp_path / "text.txt")), vocabulary=280, held_out=0.1)
    facts = json.loads((folder / "facts.json").read_text())
    facts["train_tokens"] += 1
    (folder / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"must hold \d+ train tokens in 36 documents, got"):
        open_training([str(folder)], [], context=16)


def test_short_validation_text_names_the_share(tmp_path, packed):
    """Held-out text of fewer tokens than a window is told from training text, with what to do."""
    documents = tmp_path / "a.jsonl"
    documents.write_text("".join(json.dumps({"text": "words " * 50}) + "\n" for _ in range(10)))
    prepare_corpus(tmp_path / "out", open_source(str(documents)), vocabulary=280, held_out=0.1)
    count = len(open_stream(tmp_path / "out", "validation"))
    said = rf"got {count + 1}, and {count} in .*out: prepare it again with a larger `--held-out`$"
    with pytest.raises(ValueError, match=said):
        open_training([str(tmp_path / "out")], [], context=count + 1)
    with pytest.raises(ValueError, match=r"got 41, and 40 in .*xz: a larger `held_out` keeps more"):
        open_training([str(packed)], [], context=41, held_out=0.05)
