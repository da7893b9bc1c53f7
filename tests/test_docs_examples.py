"""Every example of the README and the docs runs as it stands, page by page, on tiny models.

The folders and names that a page takes as given are made here: `path/to/model` is a tiny Llama.
What needs several processes or a server is named with the test that runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from test_docs import EXAMPLES, ROOT

import spattention as spa
from spattention.data.text import read_documents, sample_path
from spattention.data.tokenizer import for_transformers, train_tokenizer

# What an example says -> the test that runs it.
ELSEWHERE = {
    "init_device_mesh(": "tests/distributed/test_context_parallel.py",
    "sharded_attention(query": "tests/distributed/test_sharded_attention.py",
    "from openai import": "tests/serving/test_vllm.py",
    "from vllm import": "tests/serving/test_vllm.py",
}
HEADS, VOCABULARY = 8, 300
NAMES = sorted({page.name for page, _ in EXAMPLES})


def tokenizer() -> Any:
    return for_transformers(train_tokenizer(read_documents(sample_path())[:2], VOCABULARY), 8192, 0)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=8192, **sizes, **heads, **options
    )
    return transformers.LlamaForCausalLM(config).eval()


def olmoe() -> Any:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.OlmoeForCausalLM(config)


@pytest.fixture
def given(tmp_path, monkeypatch) -> dict[str, Any]:
    """The names that examples use, in a folder with the models that they name."""
    monkeypatch.chdir(tmp_path)
    transformers.logging.disable_progress_bar()
    pattern = spa.BandPattern.shared_local(HEADS, 64)
    for folder, model in (
        ("path/to/model", llama()),
        ("allenai/OLMoE-1B-7B-0924", olmoe()),
        ("banded", spa.hf.apply(llama(), pattern)),
        ("fitted", spa.hf.apply(llama(), pattern)),
    ):
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    generate = transformers.GenerationMixin.generate

    def shortened(*args: Any, **options: Any) -> Any:
        return generate(*args, **options | {"max_new_tokens": min(4, options["max_new_tokens"])})

    monkeypatch.setattr(
        transformers.GenerationMixin,
        "generate",
        lambda *args, **options: shortened(*args, **{"max_new_tokens": 4} | options),
    )
    words = tokenizer()(read_documents(sample_path())[0])["input_ids"]
    text_tokens = torch.tensor(words * (8192 // len(words) + 1))
    ids = torch.randint(1, VOCABULARY, (16, 256), generator=torch.Generator().manual_seed(0))
    return {
        "spa": spa,
        "torch": torch,
        "pattern": pattern,
        "narrow": spa.BandPattern.sliding_window(HEADS, 64, 8),
        "model": llama(),
        "tokenizer": tokenizer(),
        "inputs": {"input_ids": ids[:1, :10]},
        "batches": [ids],
        "haystacks": [text_tokens[:4096], text_tokens[4096:8192]],
        "query": torch.randn(1, HEADS, 128, 16),
        "key": torch.randn(1, HEADS, 128, 16),
        "value": torch.randn(1, HEADS, 128, 16),
        "documents": Dataset.from_dict({"text": ["It was a dark and stormy night."] * 20}),
        "pieces": [
            (torch.randn(1, HEADS, n, 64), torch.randn(1, 4, n, 64), torch.randn(1, 4, n, 64))
            for n in (20, 1, 1)
        ],
    }


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_a_page_run(name, given):
    """One after the other in one namespace, as a reader types them."""
    if name == "parallel.md":  # whose first example, run elsewhere, gives the model its bands
        spa.hf.apply(given["model"], given["pattern"])
    blocks = [text for page, text in EXAMPLES if page.name == name]
    for number, text in enumerate(blocks):
        if any(said in text for said in ELSEWHERE):
            continue
        if "spattention.adapters import" in text:
            pytest.importorskip(text.split("spattention.adapters import ")[1].split()[0])
        if "from trl import" in text:
            pytest.importorskip("trl")
        exec(compile(text, f"{name}, example {number}", "exec"), given)


def test_examples_elsewhere_name_their_tests():
    for said, test in ELSEWHERE.items():
        assert any(said in text for _, text in EXAMPLES)
        assert (ROOT / test).is_file()


def test_every_page_with_examples_is_run():
    assert len(NAMES) > 10
    assert {Path(name).suffix for name in NAMES} == {".md"}
