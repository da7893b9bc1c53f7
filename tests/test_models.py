"""The OLMoE presets: parameter counts, patterns, and that they train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spattention as spa
from spattention import models
from spattention.cache_layout import ring_lengths


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("olmoe-tiny", 2_889_856, 1_710_208),
        ("olmoe-0.25b-1.75b", 1_747_747_840, 338_461_696),
        ("olmoe-1b-7b", 6_919_161_856, 1_282_017_280),
    ],
)
def test_parameter_counts(name, total, active):
    """DESIGN.md, section 7: 6.92 B with 1.28 B active, and 1.748 B."""
    config, pattern = models.preset(name)
    assert models.count_parameters(config) == (total, active)
    assert pattern.span == config.max_position_embeddings
    heads = config.num_attention_heads
    assert pattern == spa.BandPattern.shared_local(heads, pattern.span, widths="geometric")


def test_sizes_can_be_chosen():
    config, pattern = models.preset(
        "olmoe-tiny", vocab_size=300, context=64, num_layers=2, num_heads=4
    )
    assert (config.vocab_size, config.num_hidden_layers, config.num_attention_heads) == (300, 2, 4)
    assert (config.max_position_embeddings, pattern.span, pattern.num_heads) == (64, 64, 4)
    again = models.preset("olmoe-tiny").config
    assert again.vocab_size == models.SHAPES["olmoe-tiny"].vocabulary


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "olmoe"}, r"`name` must be one of .*, got 'olmoe'"),
        ({"vocab_size": 0}, "`vocab_size` must be an integer of at least 1, got 0"),
        ({"context": 1.5}, "`context` must be an integer of at least 1, got 1\\.5"),
        ({"num_layers": True}, "`num_layers` must be an integer of at least 1, got True"),
        ({"num_heads": 7}, "`num_heads` must divide the hidden width 128 of olmoe-tiny, got 7"),
    ],
)
def test_wrong_sizes_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        models.preset(**{"name": "olmoe-tiny", **keywords})


def test_a_built_model_learns():
    """A built model learns with its bands or without."""
    chosen = models.preset("olmoe-tiny", vocab_size=50, context=32, num_layers=1)
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    for pattern, sinks in (("preset", True), (None, False), (spa.BandPattern.dense(8, 32), False)):
        torch.manual_seed(0)
        model = models.build(chosen, pattern=pattern, sinks=sinks)
        assert model.training
        assert (model.config._attn_implementation == "sdpa") is (pattern is None)
        assert any(name.endswith("sinks") for name, _ in model.named_parameters()) is sinks
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.3
    assert not hasattr(chosen.config, "spattention")  # a preset can be built again


def test_equal_seeds_give_equal_weights():
    """Equal seeds give equal weights with every pattern."""
    chosen = models.preset("olmoe-tiny", vocab_size=50, context=32, num_layers=1)
    states = []
    for pattern in ("preset", None):
        torch.manual_seed(0)
        states.append(models.build(chosen, pattern=pattern).state_dict())
    for name, weight in states[1].items():
        assert torch.equal(states[0][name], weight)


def test_an_unknown_word_for_a_pattern_is_refused():
    chosen = models.preset("olmoe-tiny", vocab_size=50, context=32, num_layers=1)
    with pytest.raises(ValueError, match="must be a BandPattern, None or \"preset\", got 'dense'"):
        models.build(chosen, pattern="dense")


def test_the_page_names_cache_sizes():
    """The page says how large a cache of each preset is."""
    page = Path(__file__).parents[1] / "docs" / "generation.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text("utf-8").splitlines()]
    found = {(row[0].strip("`"), int(row[1].replace(",", ""))): row[2:] for row in rows
             if row[0].strip("`") in models.SHAPES}  # fmt: skip
    assert len(found) == 5
    for (name, context), sizes in found.items():
        config, pattern = models.preset(name, context=context)
        heads = config.num_attention_heads
        uniform = spa.BandPattern.shared_local(heads, context)
        token = config.num_hidden_layers * 2 * (config.hidden_size // heads) * 2
        slots = [heads * context]
        slots += [sum(ring_lengths(bands, heads)) + 1 for bands in (uniform, pattern)]
        assert sizes == [f"{n * token / 2**20:,.1f}" for n in slots], name
