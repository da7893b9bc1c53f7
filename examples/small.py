"""A dense model and a text that are small enough for a CPU; stand-ins for your own.

Tokens are bytes: the tokenizer has one entry for each, and the end of text. With a model of yours
the lines become

    model = AutoModelForCausalLM.from_pretrained(NAME)
    tokenizer = AutoTokenizer.from_pretrained(NAME)
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from spattention.data.text import read_documents, sample_path
from spattention.data.tokenizer import for_transformers, train_tokenizer

HEADS, CONTEXT = 8, 256


def dense_model(context: int = CONTEXT) -> LlamaForCausalLM:
    """A Llama with grouped queries and fresh weights."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=context,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = for_transformers(train_tokenizer(["a"], 257), CONTEXT, 0)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def saved_model(folder: str) -> str:
    """The model and its tokenizer in a folder, the name of which is returned."""
    model, tokenizer = dense_model(), byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, length: int = CONTEXT) -> list[dict[str, list[int]]]:
    """Rows of a book, as a Trainer takes them."""
    text = "".join(read_documents(sample_path())[:12]).encode()
    parts = [list(text[k * length : (k + 1) * length]) for k in range(count)]
    return [{"input_ids": part, "labels": part} for part in parts]


@torch.no_grad()
def loss(model: torch.nn.Module, examples: list[dict[str, list[int]]]) -> float:
    """Mean loss in nats per byte."""
    model.eval()
    found = [model(**{k: torch.tensor([v]) for k, v in row.items()}).loss for row in examples]
    return float(torch.stack(found).mean())
