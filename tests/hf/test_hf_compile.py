"""Whole models compile into one graph: padding and packing are expressions of static shape."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import CONFIGS, FAMILIES, FIRST, HEADS, P, tokens
from torch._dynamo.testing import CompileCounter

import spattention as spa

close = torch.testing.assert_close


def model_of(family, layers=1):
    torch.manual_seed(0)
    config = CONFIGS[family](initializer_range=0.2, num_hidden_layers=layers)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return spa.hf.apply(model, FIRST, sinks=True)


def check(model, compiled, **keywords):
    ids = tokens(2, 12)
    wanted, found = model(ids, **keywords).logits, compiled(ids, **keywords).logits
    close(found, wanted, rtol=0.0, atol=1e-4)
    return found


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_one_graph(family):
    model = model_of(family).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with torch.no_grad():
        plain = check(model, compiled)
        packed = check(model, compiled, position_ids=positions, use_cache=False)
        assert not torch.equal(plain[:, 7:], packed[:, 7:])


def test_padding_and_flattened_packing_are_one_graph():
    model = model_of("llama").eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    offsets = torch.tensor([0, 7, 12], dtype=torch.int32)
    flat = {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": 7,
        "max_length_k": 7,
    }
    with torch.no_grad():
        check(model, compiled, attention_mask=mask)
        ids = tokens(1, 12)
        close(
            compiled(ids, use_cache=False, **flat).logits,
            model(ids, use_cache=False, **flat).logits,
        )


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        pytest.param(
            "olmoe",
            "aot_eager",
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.23"),
                reason="before, Transformers' grouped experts did not compile backward on the CPU",
            ),
        ),
        ("llama", "aot_eager"),
        pytest.param("llama", "inductor", marks=pytest.mark.slow),
    ],
)
def test_training_compiles(family, backend):
    model, twin = model_of(family).train(), model_of(family).train()
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    ids = tokens(2, 12)
    for net in (model, compiled):
        net(ids, labels=ids, use_cache=False).loss.backward()
    for expected, found in zip(model.parameters(), twin.parameters(), strict=True):
        close(found.grad, expected.grad, rtol=1e-3, atol=1e-5)


def test_decoding_with_a_static_cache_is_one_graph():
    model = model_of("llama", layers=2).eval()
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    ids = tokens(1, 12)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        found = [model(ids[:, :8], past_key_values=cache).logits]
        found += [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]
        close(torch.cat(found, dim=1), model(ids).logits, rtol=0.0, atol=1e-4)
    assert graphs.frame_count == 1
    spa.hf.apply(model, P.dense(HEADS, 16))
    with torch.no_grad(), pytest.raises(Exception, match="must have been filled under"):
        compiled(ids[:, :1], past_key_values=cache)


def test_a_cache_is_allocated_outside_graphs(caplog, recwarn):
    """A compiled first pass makes the cache without tracing it; in one graph it says why not."""
    model = model_of("llama", layers=2).eval()
    ids = tokens(1, 12)
    with torch.no_grad():
        cache = spa.hf.BandCache(model.config)
        compiled = torch.compile(model, backend="eager")
        found = [
            compiled(part, past_key_values=cache).logits for part in (ids[:, :11], ids[:, 11:])
        ]
        close(torch.cat(found, dim=1), model(ids).logits, rtol=0.0, atol=1e-4)
        said = [str(each.message) for each in recwarn] + [
            each.getMessage() for each in caplog.records
        ]
        assert not [text for text in said if "Dynamo" in text or "recompile_limit" in text]
        torch._dynamo.reset()
        whole = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match="allocated outside graphs"):
            whole(ids, past_key_values=spa.hf.BandCache(model.config))
