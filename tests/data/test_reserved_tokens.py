"""Text that spells a tokenizer's own tokens is text: documents end where they end."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from spattention.data.corpus import Source, prepare_corpus
from spattention.data.prepare import open_stream, prepare
from spattention.data.tokenizer import END_OF_TEXT, load_tokenizer, tokenize, train_tokenizer

SPELLED = [f"before {END_OF_TEXT} after", END_OF_TEXT, "a <pad> b <think> c", f"{END_OF_TEXT}" * 3]


@pytest.fixture
def given(tmp_path):
    """A tokenizer with more of its own: a special token, a plain one, and one of spaces."""
    tokenizer = train_tokenizer(["some words of text"] * 3, 280)
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.add_tokens(["<think>", AddedToken("    ", normalized=True)])
    path = tmp_path / "given.json"
    tokenizer.save(str(path))
    return path


def documents(stream):
    return [stream.take([k]).tokens.tolist() for k in range(stream.num_documents)]


def test_what_a_document_spells_stays_text(tmp_path, given):
    """In a folder that `prepare` writes: one end per document, no other token of the tokenizer's
    own, and the text comes back.
    """
    prepare_corpus(tmp_path / "out", Source("s", SPELLED), tokenizer=given, held_out=0.0)
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    end, pad, think = (tokenizer.token_to_id(t) for t in (END_OF_TEXT, "<pad>", "<think>"))
    found = documents(open_stream(tmp_path / "out", "train"))
    assert [tokenizer.decode(ids[:-1]) for ids in found] == SPELLED
    for ids in found:
        assert ids[-1] == end
        assert not {end, pad, think} & set(ids[:-1])
    # The tokenizer that is saved is the given one: prompts are read as Transformers reads them.
    assert tokenizer.encode(END_OF_TEXT).ids == [end]
    assert json.loads(given.read_text()) == json.loads(tokenizer.to_str())


def test_a_comparison_prepares_spelled_tokens_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in SPELLED * 3))
    facts = prepare(tmp_path / "out", tmp_path / "a.jsonl", vocabulary=270, held_out=0.3)
    assert facts.train_documents + facts.validation_documents == len(SPELLED) * 3
    stream = open_stream(tmp_path / "out", "train")
    assert int((stream.tokens == facts.end_of_text).sum()) == facts.train_documents


def test_runs_of_spaces_stay_the_tokens_they_are(given):
    """As GPT-NeoX and OLMo write indentation: a plain added token of whitespace alone."""
    tokenizer = load_tokenizer(given)
    spaces = tokenizer.token_to_id("    ")
    assert spaces in tokenize(["a    b"], tokenizer).tokens
    assert tokenizer.encode("a    b").ids == tokenize(["a    b"], tokenizer).tokens[:-1].tolist()


def test_models_that_look_up_whole_words_keep_text_too():
    """Unigram and WordLevel find `</s>` in their vocabulary, not only among the added tokens."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "a</s> ")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.add_special_tokens(["</s>", "<pad>"])
    unigram.add_tokens(["   "])
    found = tokenize(["a</s>a   a"], unigram, unigram.token_to_id("</s>"))
    assert unigram.decode(found.tokens.tolist(), skip_special_tokens=False) == (
        "a < / s > a     a </s>"
    )
    assert unigram.token_to_id("   ") in found.tokens
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["</s>"])
    assert tokenize(["a </s> a"], words, 0).tokens.tolist() == [1, 2, 1, 0]


def test_text_that_cannot_stay_text_is_refused():
    """A merge, or the end of text that the user names, may make the token from plain text."""
    whole = Tokenizer(models.BPE({"</s>": 0, "a": 1}, [], ignore_merges=True))
    whole.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="must keep '</s>' out of text, but a document that"):
        tokenize(["</s>"], whole, 0)
    with pytest.raises(ValueError, match="`end_of_text` must be a token of the tokenizer, got 9"):
        tokenize(["a"], whole, 9)


def test_dropout_of_merges_does_not_reach_a_corpus(tmp_path):
    tokenizer = train_tokenizer(["words and words of text and text"] * 9, 290)
    expected = tokenize(["words of text"] * 20, tokenizer).tokens
    tokenizer.model.dropout = 0.9
    np.testing.assert_array_equal(tokenize(["words of text"] * 20, tokenizer).tokens, expected)
