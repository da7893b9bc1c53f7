"""The benchmark of training steps, at tiny size: all sides in turns in one model."""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import varlen

from benchmarks import training, training_models, training_sides
from benchmarks.training_documents import Documents, Separated
from benchmarks.training_sides import BACKENDS, Side, dense_side, predict
from benchmarks.turns import turns
from spattention import BandPattern
from spattention.choice import attention_choice
from spattention.models import build, preset

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from cpu_recorder import Recorder

PATTERNS = ("shared_local:local=4", "longformer:wide=4", "exclusive")


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's `varlen_attn` on a CPU, for which it has no kernel."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        offsets: torch.Tensor,
        key_offsets: torch.Tensor,
        longest: int,
        longest_keys: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        assert offsets.dtype == torch.int32
        assert torch.equal(offsets, key_offsets)
        assert window_size == (-1, 0)
        lengths = offsets.diff().tolist()
        assert sum(lengths) == len(query) == len(key) == len(value)
        assert longest == longest_keys == max(lengths)
        parts = [each.transpose(0, 1).split(lengths, 1) for each in (query, key, value)]
        options = {"is_causal": True, "scale": scale, "enable_gqa": enable_gqa}
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([sdpa(*part, **options) for part in zip(*parts)], 1).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    training_sides._varlen.cache_clear()
    yield
    training_sides._varlen.cache_clear()


@pytest.mark.parametrize(
    ("patterns", "more"),
    [
        (PATTERNS, ()),
        ((), ()),
        (PATTERNS[:1], ("--graphs",)),
        ((PATTERNS[0], PATTERNS[2]), ("--documents", "3", "--turns", "turns.lock")),
        (PATTERNS[:1], ("--documents", "3", "--dense", "math", "varlen")),
    ],
    ids=["all", "dense alone", "graphs", "documents", "flash"],
)
@pytest.mark.usefixtures("flash")
def test_all_sides_are_measured_in_one_model(
    patterns: tuple[str, ...],
    more: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "Recorder", Recorder)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "found.json"
    command = (
        "training.py --model olmoe-tiny --layers 1 --vocabulary 64 --length 32 --tokens 64 "
        "--passes 1 --repeats 2 --no-compile --dense math --loss chunked --patterns"
    )
    given = [*command.split(), *patterns, *more, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", given)
    training.main()
    rows = json.loads(output.read_text())["rows"]
    flash = [BACKENDS["varlen"][0]] if "varlen" in more else []
    assert [row["attention"] for row in rows] == [BACKENDS["math"][0], *flash, *patterns]
    assert all(len(row["all_seconds"]) == 2 and row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["over_dense"] == 1
    checked = [row["attention"] for row in rows if row["check"]]
    bands = [name for name in patterns if not name.startswith("longformer")]
    assert checked == [*flash, *bands]


def test_a_side_leaves_the_model_as_it_was() -> None:
    """A side attends its own way and leaves the model as it was."""
    chosen = preset("olmoe-tiny", vocab_size=64, context=32, num_layers=1)
    torch.manual_seed(0)
    model = build(chosen, pattern=None).eval()
    tokens = torch.randint(64, (1, 32))
    heads = chosen.pattern.num_heads
    before, section = model(tokens).logits, model.config.to_dict()
    seen = []
    for name in (*PATTERNS, "dense"):
        side = Side(name, attention_choice(name, heads, 32), None)
        with side.chosen(model):
            seen.append(model(tokens).logits)
        torch.testing.assert_close(model(tokens).logits, before)
        assert model.config.to_dict() == section
    torch.testing.assert_close(seen.pop(), before)
    assert [bool((other - before).abs().max() > 1e-4) for other in seen] == [True] * len(PATTERNS)


@pytest.mark.parametrize("documents", [None, Documents.of(3, 64)], ids=["text", "documents"])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-4b"])
def test_grouped_models_are_compared(
    name: str, documents: Documents | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands with a prefix per key/value head agree with their dense mask; another mask does not."""
    for shape in (training_models.LLAMA_1B, training_models.QWEN3_4B):
        for key, value in {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}.items():
            monkeypatch.setitem(shape, key, value)
    torch.manual_seed(0)
    model = training_models.random_model(name, 64, 2, 96, torch.device("cpu"))
    tokens = torch.randint(96, (2, 64))
    text = "exclusive:kv_heads=8,prefix=4"
    side = Side(text, attention_choice(text, 32, 64), None)
    side.compare(model, tokens, documents)
    assert side.check is not None
    assert side.check["gradient_difference"] < 1e-4
    mask = BandPattern.mask
    monkeypatch.setattr(
        BandPattern, "mask", lambda self, *rest, **more: mask(self, *rest, **more).flip(0)
    )
    with pytest.raises(RuntimeError, match="differs from its reference"):
        side.compare(model, tokens, documents)


def test_documents_fill_a_row() -> None:
    """Positions restart with each document, and the mask is causal within it."""
    documents = Documents.of(5, 64)
    assert sum(documents.lengths) == 64
    assert len(set(documents.lengths)) > 1
    positions = documents.positions(torch.device("cpu"))
    assert positions.tolist() == [k for length in documents.lengths for k in range(length)]
    mask = documents.mask(torch.device("cpu"))
    expected = torch.block_diag(*(torch.ones(n, n).tril() for n in documents.lengths)).bool()
    assert torch.equal(mask, expected)
    dense = attention_choice("dense", 2, 64)
    assert Separated(dense, documents).pairs(64) == 2 * int(expected.sum())
    for count in (0, 65):
        with pytest.raises(ValueError, match="documents of a row must be 1 to 64"):
            Documents.of(count, 64)


@pytest.mark.usefixtures("flash")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_dense_sides_see_their_own_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention and PyTorch's from positions, and `varlen_attn`, give what a mask gives."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    small = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    monkeypatch.setattr(training_models, "LLAMA_1B", training_models.LLAMA_1B | small)
    torch.manual_seed(0)
    model = training_models.random_model("llama-3.2-1b", 128, 1, 64, torch.device("cpu")).eval()
    tokens = torch.randint(64, (1, 128))
    documents = Documents.of(3, 128)
    positions = documents.positions(tokens.device)[None]
    mask = documents.mask(tokens.device)[None, None]
    with torch.no_grad():
        expected = model(tokens, position_ids=positions, attention_mask=mask).logits
        across = model(tokens).logits
        assert not torch.allclose(across, expected, atol=1e-4)
        for name in ("math", "flex", "varlen"):
            with dense_side(name, 32, 128, documents).chosen(model):
                found = model(tokens, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(found, expected)
    assert model.config._attn_implementation == "sdpa"


def test_checked_documents_are_cut(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by offsets is compared over the first tokens of the first row; a fault is seen."""
    monkeypatch.setattr(training_sides, "CHECKED_TOKENS", 90)
    small = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    monkeypatch.setattr(training_models, "LLAMA_1B", training_models.LLAMA_1B | small)
    torch.manual_seed(0)
    model = training_models.random_model("llama-3.2-1b", 128, 1, 64, torch.device("cpu"))
    tokens, documents = torch.randint(64, (2, 128)), Documents.of(5, 128)
    assert documents.lengths[0] < 90 < sum(documents.lengths[:-1])
    side = dense_side("varlen", 32, 128, Documents(documents.lengths * 2))
    side.compare(model, tokens, documents)
    assert side.check is not None
    assert side.check["tokens"] == 90
    assert side.check["gradient_difference"] < 1e-4
    with pytest.raises(RuntimeError, match="differs from its reference"):
        side.compare(model, tokens, Documents.of(4, 128))
    with pytest.raises(ValueError, match="varlen needs documents"):
        dense_side("varlen", 32, 128)


@pytest.mark.parametrize("name", ["math", "flex", "varlen", "shared_local"])
@pytest.mark.usefixtures("flash")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_kernels_alone_see_their_own_documents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed alone is what the model's layers compute."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    documents = Documents.of(3, 256)
    mask = documents.mask(torch.device("cpu"))
    if name == "shared_local":
        side = Side(name, attention_choice(name, 4, 256), None)
        mask = mask & BandPattern.shared_local(4, 256).mask(256)
    else:
        side = dense_side(name, 4, 256, documents)
    query, key, value = (torch.randn(1, heads, 256, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        found = side._attention_of((query, key, value), documents)()
    groups = (key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *groups, attn_mask=mask)
    torch.testing.assert_close(found, expected)


def test_processes_take_turns(tmp_path: Path) -> None:
    """One that has prepared waits for another that prepares, and then keeps the next waiting."""
    path = tmp_path / "lock"
    with turns(path) as alone:
        alone()
        with path.open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with turns(None) as alone:
        alone()


def test_predictions_are_of_kernels_alone() -> None:
    """A gain of half of what the kernels save is a share of .5."""
    sides = [
        Side(name, attention_choice("dense", 2, 8), None, kernel_seconds=seconds)
        for name, seconds in (("dense", 0.5), ("bands", 0.1))
    ]
    found = predict(*sides, {"dense": 1.0, "bands": 0.8})
    assert found == {
        "predicted_seconds": pytest.approx(0.6),
        "share_of_predicted_gain": pytest.approx(0.5),
        "share_of_predicted_speed": pytest.approx(0.75),
    }
    assert predict(sides[0], sides[0], {"dense": 1.0}) == {}
