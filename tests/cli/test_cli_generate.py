"""`spattention generate` on models of every kind that it takes; `test_cli_compare.py` has those
that a comparison leaves behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from saved_model import PATTERN, PROMPT, save
from transformers import AutoModelForCausalLM

import spattention as spa
from spattention.cache_layout import ring_lengths
from spattention.cli import main
from spattention.loading import open_model, open_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("banded"), sinks=True)


def _mebibytes(text: str) -> float:
    (found,) = re.findall(r"cache ([\d.]+) MiB", text)
    return float(found)


def test_a_span_may_exceed_the_longest_input(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`apply` takes the span of any pattern, so commands open what it made."""
    folder = save(tmp_path / "saved", bands=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    far = spa.BandPattern.shared_local(4, 2**20, local=8)
    spa.hf.apply(model, far).save_pretrained(folder)
    assert main(["generate", str(folder), PROMPT, "--max-new-tokens", "3"]) == 0
    assert "cache" in capfd.readouterr().err
    assert spa.hf.patterns(open_model(folder)) == [far, far]
    assert main(["draw", str(folder), "--output", str(tmp_path / "far.png")]) == 0


def test_the_cache_keeps_what_the_bands_reach(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(saved), PROMPT, "--temperature", "0", "--max-new-tokens", "120"]
    assert main(command) == 0
    found = capfd.readouterr()
    slots = sum(ring_lengths(PATTERN, 2)) + 1
    assert _mebibytes(found.err) == pytest.approx(2 * 2 * slots * 8 * 4 / 2**20, abs=0.005)
    model, tokenizer = open_model(saved), open_tokenizer(saved)
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


def test_dense_is_stock_attention_on_the_weights(saved: Path) -> None:
    """Dense means the same weights and stock attention."""
    dense, banded, tokenizer = (
        open_model(saved, dense=True),
        open_model(saved),
        open_tokenizer(saved),
    )
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


def test_a_dense_model_has_nothing_to_compare(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A dense model generates and has nothing to compare."""
    folder = save(tmp_path, bands=False)
    command = ["generate", str(folder), PROMPT, "--max-new-tokens", "3"]
    assert main(command) == 0
    assert "3 tokens after a prompt of" in capfd.readouterr().err
    assert main([*command, "--compare", "dense"]) == 2
    assert "`--compare dense` needs a model with bands" in capfd.readouterr().err


def test_a_full_context_is_told(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fewer tokens than asked for have their reason."""
    assert main(["generate", str(saved), PROMPT, "--max-new-tokens", "5"]) == 0
    assert "is full" not in capfd.readouterr().err
    assert main(["generate", str(saved), PROMPT * 8, "--max-new-tokens", "5000"]) == 0
    assert "the model's context of 600 tokens is full" in capfd.readouterr().err
