"""Byte-level BPE tokenizers, by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .tokens import TokenStream

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` entries, the bytes and the end of text among them."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocabulary < smallest:
        raise ValueError(
            f"`vocabulary` must be at least {smallest} (the bytes and the end of text), got "
            f"{vocabulary}"
        )
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


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, without the truncation and padding that it may ask for:
    a corpus is tokenized whole.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: a tokenizer is one `tokenizer.json`")
    try:
        found = Tokenizer.from_file(str(path))
    except (
        Exception
    ) as error:  # the library raises plain `Exception` for a file that it cannot read
        raise ValueError(
            f"{path} must be a tokenizer of the `tokenizers` library: {error}"
        ) from error
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
        raise ValueError(f"the tokenizer must have the token {token}, it has not")
    return found


def tokenize(
    documents: Sequence[str], tokenizer: Tokenizer, end_of_text: int | None = None
) -> TokenStream:
    """The stream of these documents, each followed by the end of text; by default its own."""
    end = end_of_text_id(tokenizer) if end_of_text is None else end_of_text
    dtype = np.uint16 if entries_of(tokenizer) <= 2**16 else np.uint32
    encoded = tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
    return TokenStream.from_documents([np.array([*e.ids, end], dtype) for e in encoded])


def for_transformers(
    tokenizer: Tokenizer, context: int, end_of_text: int | None
) -> PreTrainedTokenizerFast:
    """The same tokenizer as Transformers saves it beside a model.

    Args:
        tokenizer: what turns text into tokens.
        context: the most tokens that the model takes.
        end_of_text: the token that ends a text; None if none is known.
    """
    end = None if end_of_text is None else tokenizer.id_to_token(end_of_text)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, model_max_length=context
    )
