"""`spattention generate` on models of every kind that it takes; `test_cli_compare.py` has those
that a comparison leaves behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import spattention as spa
from spattention.cache_layout import ring_lengths
from spattention.cli import main
from spattention.cli.generate import open_dense, open_model
from spattention.data.tokenizer import for_transformers, train_tokenizer

PROMPT = "It was a dark and stormy night, and the captain said to the crew"
SPAN = 40
PATTERN = spa.BandPattern.exclusive(4, SPAN)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def _save(folder: Path, sinks: bool = False, bands: bool = True) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([PROMPT], 270)
    config = LlamaConfig(vocab_size=270, max_position_embeddings=600, **SIZES, **HEADS)
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if bands:
        spa.hf.apply(model, PATTERN, sinks=sinks)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    for_transformers(tokenizer, 600, None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("banded"), sinks=True)


def _mebibytes(text: str) -> float:
    (found,) = re.findall(r"cache ([\d.]+) MiB", text)
    return float(found)


def test_the_cache_keeps_what_the_bands_reach(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(saved), PROMPT, "--temperature", "0", "--max-new-tokens", "120"]
    assert main(command) == 0
    found = capfd.readouterr()
    slots = sum(ring_lengths(PATTERN, 2)) + 1
    assert _mebibytes(found.err) == pytest.approx(2 * 2 * slots * 8 * 4 / 2**20, abs=0.005)
    model, tokenizer = open_model(saved)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=120, do_sample=False, use_cache=False)
    assert found.out.strip() == tokenizer.decode(wanted[0]).strip()


def test_compare_dense_shows_both(
    saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    command = ["generate", str(saved), PROMPT, "--temperature", "0", "--max-new-tokens", "150"]
    assert main([*command, "--compare", "dense"]) == 0
    found = capfd.readouterr()
    _, bands, dense = re.split("--- .* ---\n", found.out)
    assert bands.startswith(PROMPT)
    assert dense.startswith(PROMPT)
    assert bands != dense
    sizes = re.search(r"cache, MiB\W+([\d.]+)\W+([\d.]+)", found.err)
    assert sizes is not None
    assert float(sizes[1]) < float(sizes[2])
    for row in ("tokens added", "seconds to the first", "tokens/s after it"):
        assert row in found.err


def test_dense_means_the_same_weights_and_stock_attention(saved: Path) -> None:
    dense, (banded, tokenizer) = open_dense(saved), open_model(saved)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert dense.config._attn_implementation == "sdpa"
    assert not any("sinks" in name for name in dense.state_dict())
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, banded.state_dict()[name])
    with torch.no_grad():
        found = dense(ids).logits
        assert not torch.allclose(found, banded(ids).logits, atol=1e-2)
        spa.hf.apply(dense, spa.BandPattern.dense(4, 600))
        torch.testing.assert_close(found, dense(ids).logits, rtol=0, atol=1e-4)


def test_a_dense_model_generates_and_has_nothing_to_compare(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = _save(tmp_path, bands=False)
    command = ["generate", str(folder), PROMPT, "--max-new-tokens", "3"]
    assert main(command) == 0
    assert "3 tokens after a prompt of" in capfd.readouterr().err
    assert main([*command, "--compare", "dense"]) == 2
    assert "`--compare dense` needs a model with bands" in capfd.readouterr().err
