"""Entropies against weights that eager attention returns, and against what they must be."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)

import spattention as spa
from spattention import baselines
from spattention.evaluation.heads import head_statistics

HEADS, SPAN, LAYERS = 4, 90, 2
P = spa.BandPattern


def build(implementation="sdpa", seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def tokens(rows, length):
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(3))


def from_weights(weights):
    """Entropy and distance per head, and divergence, of `[B, H, N, N]`, row by row."""
    entropy, distance = torch.zeros(HEADS), torch.zeros(HEADS)
    divergence = []
    for row in weights:
        for i in range(row.shape[1]):
            each = []
            for head in range(HEADS):
                p = row[head, i]
                each.append(-sum(float(x) * math.log(x) for x in p if x > 0))
                entropy[head] += each[-1]
                distance[head] += sum(float(x) * (i - j) for j, x in enumerate(p))
            mixed = row[:, i].mean(dim=0)
            whole = -sum(float(x) * math.log(x) for x in mixed if x > 0)
            divergence.append(whole - sum(each) / HEADS)
    count = weights.shape[0] * weights.shape[2]
    return entropy / count, distance / count, sum(divergence) / count


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_heads_are_those_of_eager_attention(implementation):
    model, ids = build(implementation), tokens(2, 70)  # more than one block of rows
    with torch.no_grad():
        attentions = build("eager")(ids, output_attentions=True).attentions
    found = head_statistics(model, ids)
    assert len(found) == LAYERS
    for layer, weights in zip(found, attentions):
        entropy, distance, divergence = from_weights(weights)
        assert layer.entropy == pytest.approx(entropy.tolist(), abs=1e-4)
        assert layer.distance == pytest.approx(distance.tolist(), rel=1e-3, abs=1e-3)
        assert layer.divergence == pytest.approx(divergence, abs=1e-4)
    assert model.config._attn_implementation == implementation


def test_bands_are_looked_at_through_their_masks():
    """A model without weights of its own looks at all that it may alike: log of the number."""
    pattern = P.shared_local(HEADS, SPAN)
    model = spa.hf.apply(build(), pattern)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    found = head_statistics(model, tokens(1, 70))[1]
    mask = pattern.mask(70)
    counts = mask.sum(dim=-1).double()
    assert found.entropy == pytest.approx(counts.log().mean(dim=1).tolist(), abs=1e-5)
    weights = mask / counts[..., None]
    _, distance, divergence = from_weights(weights[None].float())
    assert found.distance == pytest.approx(distance.tolist(), rel=1e-4)
    assert found.divergence == pytest.approx(divergence, abs=1e-4)


def test_empty_queries_and_sinks():
    """Queries without keys are left out and sinks are a place."""
    pattern = P.exclusive(HEADS, SPAN)  # the last head has keys from position 68 on
    model = spa.hf.apply(build(), pattern)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    bare = head_statistics(model, tokens(1, 70))[0]
    assert bare.entropy[3] == pytest.approx((math.log(1) + math.log(2)) / 2, abs=1e-6)
    spa.hf.apply(model, pattern, sinks=True)  # zero, as likely as any key
    sunk = head_statistics(model, tokens(1, 70))[0]
    counts = pattern.mask(70)[3].sum(dim=-1) + 1
    assert sunk.entropy[3] == pytest.approx(float(counts.double().log().mean()), abs=1e-5)


@pytest.mark.parametrize("name", ["longformer", "reformer"])
def test_baselines_are_looked_at(name):
    kinds = {"longformer": baselines.Longformer, "reformer": baselines.Reformer}
    model = baselines.apply(build(), kinds[name](HEADS, SPAN))
    before = model(tokens(1, 70)).logits
    for layer in head_statistics(model, tokens(1, 70)):
        assert all(0 < value < math.log(70) for value in layer.entropy)
        assert 0 < layer.divergence < math.log(HEADS)
    assert torch.equal(model(tokens(1, 70)).logits, before)  # nothing stays behind


def test_other_implementations_are_refused():
    model = build()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="must have stock attention, bands or a baseline"):
        head_statistics(model, tokens(1, 9))


def test_a_window_beside_bands_is_refused():
    """The weights are computed again without it."""
    config = Qwen2Config(
        vocab_size=31, hidden_size=32, intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, use_sliding_window=True,
        sliding_window=5, max_window_layers=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    spa.hf.apply(model, [P.exclusive(HEADS, SPAN), None])
    with pytest.raises(ValueError, match="layers must not have windows of their own, got 5"):
        head_statistics(model, tokens(1, 20))


@pytest.mark.parametrize("pattern", [P.dense(HEADS, SPAN), P.shared_local(HEADS, SPAN)])
def test_sinks_that_the_model_has_count(pattern):
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=31, hidden_size=32, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=HEADS, num_key_value_heads=2, num_local_experts=2,
        num_experts_per_tok=1, layer_types=["full_attention"],
    )  # fmt: skip
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    spa.hf.apply(model, pattern)
    attention = model.model.layers[0].self_attn
    found = []
    for height in (-30.0, 30.0):
        attention.sinks.data.fill_(height)
        found.append(head_statistics(model, tokens(1, 20))[0].entropy)
    assert min(found[0]) > 1.0
    assert max(found[1]) < 1e-6, "all weight goes to the sink"
