"""Byte-level BPE tokenizers, by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..files import check_bytes, check_local, shown, shown_path, write_atomically
from .bounds import LARGEST_VOCABULARY
from .tokens import TokenStream

END_OF_TEXT = "<|endoftext|>"
# Of other tokenizers, the likeliest first.
USUAL_ENDS = ("</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
TOKENIZER = "tokenizer.json"
TOKENIZER_BYTES = 2**28
UNREACHABLE = "\U0010ffff"  # a noncharacter: text does not hold it


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` entries, the bytes and the end of text among them."""
    check_vocabulary(vocabulary)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def check_vocabulary(vocabulary: int) -> None:
    """Raise ValueError unless `train_tokenizer` can train that number of entries."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if not smallest <= vocabulary <= LARGEST_VOCABULARY:
        raise ValueError(
            f"`vocabulary` must be at least {smallest} (the bytes and the end of text) and at most "
            f"{LARGEST_VOCABULARY}, got {vocabulary}"
        )


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a `tokenizer.json`."""
    write_atomically(path, tokenizer.to_str(pretty=True))


def find_tokenizer(name: str) -> Path:
    """The `tokenizer.json` that a user names: that file, a folder that holds one, or a model or a
    tokenizer on the Hugging Face hub. Raises `ValueError` that says why there is none."""
    path = Path(name)
    if path.is_dir():
        if not (path / TOKENIZER).is_file():
            raise ValueError(f"`--tokenizer` must be a folder with a {TOKENIZER}, {path} has none")
        return path / TOKENIZER
    if path.exists():
        return path
    check_local(name, f"`--tokenizer` must be a {TOKENIZER}, its folder or a model", (".json",))
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, TOKENIZER))
    except Exception as error:  # of the hub, the network and the cache, of many types
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"`--tokenizer` must be a {TOKENIZER}, its folder or a model on the hub that has one, "
            f"got {shown_path(name)}: {reason}"
        ) from error


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, with truncation and padding off.

    Raises:
        ValueError: if there is no such file, it is larger than 2**28 bytes, or it holds no
            tokenizer whose tokens are below `LARGEST_VOCABULARY`.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: a tokenizer is one `tokenizer.json`")
    check_bytes(path, TOKENIZER_BYTES)
    try:
        found = Tokenizer.from_file(str(path))
    except (
        Exception
    ) as error:  # the library raises plain `Exception` for a file that it cannot read
        raise ValueError(
            f"{path} must be a tokenizer of the `tokenizers` library: {error}"
        ) from error
    entries = entries_of(found)
    if not 1 <= entries <= LARGEST_VOCABULARY:
        raise ValueError(
            f"{path} must number its tokens below {LARGEST_VOCABULARY}, and have some: its largest "
            f"is {entries - 1}"
        )
    found.no_truncation()
    found.no_padding()
    return found


def entries_of(tokenizer: Tokenizer) -> int:
    """Entries that an embedding needs: one more than the largest token, as ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def end_of_text_id(tokenizer: Tokenizer, token: str = END_OF_TEXT) -> int:
    """The id of the token that ends each document, by default `<|endoftext|>`."""
    found = tokenizer.token_to_id(token)
    if found is None:
        own = [name for name in USUAL_ENDS if tokenizer.token_to_id(name) is not None]
        hint = f"; `prepare` takes another with `--end-of-text`, such as {own[0]!r}" if own else ""
        raise ValueError(f"the tokenizer must have the token {token}, it has not{hint}")
    return found


class DocumentEncoder:
    """Turns documents into tokens, each with the token that ends it; what they spell stays text. A
    tokenizer turns `<|endoftext|>` and its other added tokens, wherever a text spells them, into
    single tokens. In a document they are text like any other: it was written by somebody else, and
    would end in the middle. Added tokens of whitespace alone are kept, because they are how
    GPT-NeoX and OLMo write indentation. Dropout of BPE merges is off: a corpus is the same twice.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_text: int) -> None:
        self.end_of_text = end_of_text
        self.dtype = np.dtype(np.uint16 if entries_of(tokenizer) <= 2**16 else np.uint32)
        description = json.loads(tokenizer.to_str())
        added = {token["content"] for token in description["added_tokens"]}
        end = tokenizer.id_to_token(end_of_text)
        if end is None:
            raise ValueError(f"`end_of_text` must be a token of the tokenizer, got {end_of_text}")
        reserved = {token for token in added if token.strip()} | {end}
        reserved.discard(_unknown(description["model"]))  # which text may become
        ids = tokenizer.get_vocab()
        self._reserved = {ids[token]: token for token in reserved}
        self._encoder = Tokenizer.from_str(json.dumps(_without(description, reserved)))
        self._encoder.encode_special_tokens = True  # as text, that is

    def encode(self, documents: Sequence[str]) -> TokenStream:
        """The stream of these documents, each followed by the end of text.

        Raises:
            ValueError: if the tokenizer cannot take a document, or turns text into a reserved token
                all the same.
        """
        try:
            encoded = self._encoder.encode_batch_fast(list(documents), add_special_tokens=False)
        except Exception as error:  # the library raises plain `Exception`
            raise ValueError(f"the tokenizer cannot take this text: {error}") from error
        for text, found in zip(documents, encoded):
            hit = self._reserved.keys() & set(found.ids)
            if hit:
                raise ValueError(
                    f"the tokenizer must keep {self._reserved[min(hit)]!r} out of text, but a "
                    f"document that spells it gets the token: {shown(text)}"
                )
        return TokenStream.from_documents(
            [np.array([*each.ids, self.end_of_text], self.dtype) for each in encoded]
        )


def _unknown(model: dict[str, Any]) -> str | None:
    """The token of a model for what it does not know, if it has one."""
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _without(description: dict[str, Any], reserved: set[str]) -> dict[str, Any]:
    """The description of a tokenizer, in place, that does not look for reserved tokens in text.

    Models that look up whole words find them in their vocabulary too, where they get a name that no
    text holds. The ids of all other tokens stay.
    """
    model = description["model"]
    hidden: set[str] = set()
    if model["type"] == "Unigram":
        hidden = reserved & {piece for piece, _ in model["vocab"]}
        model["vocab"] = [
            [UNREACHABLE + piece if piece in hidden else piece, score]
            for piece, score in model["vocab"]
        ]
    elif model["type"] == "BPE":
        model["dropout"] = None
    else:
        hidden = reserved & model["vocab"].keys()
        model["vocab"] = {
            UNREACHABLE + word if word in hidden else word: number
            for word, number in model["vocab"].items()
        }
    description["added_tokens"] = [
        {**token, "special": token["content"] in reserved}
        for token in description["added_tokens"]
        if token["content"] not in hidden
    ]
    description["post_processor"] = None  # may ask for tokens that are gone; it is not applied
    return description


def tokenize(
    documents: Sequence[str], tokenizer: Tokenizer, end_of_text: int | None = None
) -> TokenStream:
    """The stream of these documents, each followed by the end of text; by default its own."""
    end = end_of_text_id(tokenizer) if end_of_text is None else end_of_text
    return DocumentEncoder(tokenizer, end).encode(documents)


def for_transformers(
    tokenizer: Tokenizer, context: int, end_of_text: int | None
) -> PreTrainedTokenizerFast:
    """The same tokenizer as Transformers saves it beside a model that takes `context` tokens at
    most."""
    end = None if end_of_text is None else tokenizer.id_to_token(end_of_text)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, model_max_length=context
    )
