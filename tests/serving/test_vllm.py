"""vLLM itself, on the CPU: Transformers' tokens, freed blocks, and refusals at start-up."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spattention as spa
from spattention.serving.head_classes import head_classes

from . import engine, folders

pytest.importorskip("vllm")
pytestmark = [pytest.mark.serving, pytest.mark.timeout(900)]

NEW_TOKENS = 40
# One token alone, prompts within the span of 96 and prompts beyond it, whose first blocks are freed
# while they are read.
PROMPTS = folders.prompts([1, 70, 200, 300])
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.mark.parametrize(
    ("family", "sinks"),
    [("llama", False), ("mistral", False), ("qwen3", True), ("olmoe", True), ("olmo3", True)],
)
def test_tokens_are_transformers_tokens(tmp_path: Path, family: str, sinks: bool) -> None:
    """Four requests at once in blocks of 16 and chunks of 64, again from cached prefixes."""
    folder = folders.save(tmp_path, family, sinks=sinks)
    expected = folders.greedy(folder, PROMPTS, NEW_TOKENS)
    first, again = engine.generate_in_vllm(folder, [PROMPTS, PROMPTS], NEW_TOKENS)
    assert first["tokens"] == expected
    assert again["tokens"] == expected
    assert first["cached"] == [0, 0, 0, 0]
    assert again["cached"][0] == 0
    assert min(again["cached"][1:]) >= 64  # so the second run did read the first one's blocks
    (line,) = first["log"]
    assert f"bands in {1 if family == 'olmo3' else 2} of 2 layers" in line


def test_two_ranks_give_the_same_tokens(tmp_path: Path) -> None:
    """Tensor parallelism: each rank has its heads' bands and sinks, in two classes of heads."""
    first, second = folders.FIRST.intervals, folders.SECOND.intervals
    patterns = (spa.BandPattern(first + second, folders.SPAN),) * 2
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = folders.save(tmp_path, "qwen3", patterns, sinks=True, **shape)
    assert [len(head_classes(list(patterns), 4, ranks=2, rank=r)[0]) for r in (0, 1)] == [2, 2]
    (run,) = engine.generate_in_vllm(folder, [PROMPTS], NEW_TOKENS, tensor_parallel_size=2)
    assert run["tokens"] == folders.greedy(folder, PROMPTS, NEW_TOKENS)


def test_an_adapter_gives_its_merged_models_tokens(tmp_path: Path) -> None:
    """LoRA of the attention's weights, on bands."""
    folder, merged = folders.save(tmp_path / "model"), tmp_path / "merged"
    folders.save_adapter(folder, merged, tmp_path / "adapter")
    settings = {"enable_lora": True, "max_lora_rank": 8}
    (run,) = engine.generate_in_vllm(
        folder, [PROMPTS], NEW_TOKENS, tmp_path / "adapter", **settings
    )
    expected = folders.greedy(merged, PROMPTS, NEW_TOKENS)
    assert run["tokens"] == expected
    assert expected != folders.greedy(folder, PROMPTS, NEW_TOKENS)


def test_compiled_models_give_the_same_tokens(tmp_path: Path) -> None:
    """Without `enforce_eager`, as users run it, and with chunks that cut blocks."""
    folder = folders.save(tmp_path)
    settings = {"enforce_eager": False, "max_num_batched_tokens": 41}
    (run,) = engine.generate_in_vllm(folder, [PROMPTS], NEW_TOKENS, **settings)
    assert run["tokens"] == folders.greedy(folder, PROMPTS, NEW_TOKENS)


def test_tokens_survive_a_full_cache(tmp_path: Path) -> None:
    """Requests that grow until vLLM interrupts one for want of blocks, and starts it again."""
    folder = folders.save(tmp_path)
    prompts = folders.prompts([1, 2, 3, 5])
    settings = {"num_gpu_blocks_override": 22, "enable_prefix_caching": False}
    (run,) = engine.generate_in_vllm(folder, [prompts], 150, **settings)
    assert run["tokens"] == folders.greedy(folder, prompts, 150)
    assert run["interrupted"] > 0


def test_one_window_gives_the_same_tokens(tmp_path: Path) -> None:
    """vLLM's manager of several windows may be off, as with some of its options."""
    folder = folders.save(tmp_path)
    settings = {"disable_hybrid_kv_cache_manager": True}
    (run,) = engine.generate_in_vllm(folder, [PROMPTS], NEW_TOKENS, **settings)
    assert run["tokens"] == folders.greedy(folder, PROMPTS, NEW_TOKENS)


def test_prefix_tokens_are_served(tmp_path: Path) -> None:
    """Layers with prefixes within a block and over two: prompts far beyond the span, again from
    cached prefixes, while blocks between prefix and window are freed."""
    patterns = replace(folders.FIRST, prefix=3), replace(folders.SECOND, prefix=20)
    folder = folders.save(tmp_path, patterns=patterns)
    expected = folders.greedy(folder, PROMPTS, NEW_TOKENS)
    first, again = engine.generate_in_vllm(folder, [PROMPTS, PROMPTS], NEW_TOKENS)
    assert first["tokens"] == expected
    assert again["tokens"] == expected
    assert min(again["cached"][1:]) >= 64
    without = folders.save(tmp_path / "without", patterns=(folders.FIRST, folders.SECOND))
    assert folders.greedy(without, PROMPTS, NEW_TOKENS)[1:] != expected[1:]
    (long,) = engine.generate_in_vllm(
        folder, [folders.prompts([400])], 8, enable_prefix_caching=False
    )
    (classes,) = head_classes(list(patterns), 2)[:1]
    assert long["most_blocks"] < 0.7 * len(classes) * -(-400 // 16)


def test_decoding_requests_go_to_the_kernels(monkeypatch: Any) -> None:
    """Where there are kernels, they get vLLM's own buffers, which a captured graph reads again; the
    other requests of a step are packed behind them. No step waits for the device, and none with
    requests that only pad it to a captured size."""
    from spattention.serving import vllm_backend

    builder = vllm_backend.BandMetadataBuilder.__new__(vllm_backend.BandMetadataBuilder)
    builder.block_size, builder.window, builder.prefix = 16, 40, 3
    builder.has_kernels, builder.sample = True, torch.empty(1, 16)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        vllm_backend, "page_kernels", lambda *facts: asked.append(facts[2:]) or vllm_backend
    )

    def build(offsets: list[int], lengths: list[int]) -> Any:
        common = SimpleNamespace(
            num_reqs=len(lengths),
            max_query_len=7,
            max_seq_len=max(lengths),
            query_start_loc=torch.tensor(offsets, dtype=torch.int32),
            query_start_loc_cpu=torch.tensor(offsets),
            seq_lens=torch.empty(len(lengths), dtype=torch.int32, device="meta"),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            block_table_tensor=torch.arange(4 * len(lengths), dtype=torch.int32).view(-1, 4),
        )
        return builder.build(0, common).step, common

    step, mixed = build([0, 1, 2, 9], [50, 7, 30])
    assert step.decodes.seq_lens.data_ptr() == mixed.seq_lens.data_ptr()
    assert step.decodes.seq_lens.shape == (2,)
    assert step.decodes.block_table.data_ptr() == mixed.block_table_tensor.data_ptr()
    assert (step.prefills.first, step.prefills.last) == (2, 9)
    assert step.prefills.cu_seqlens_q.tolist() == [0, 7]
    rest = mixed.block_table_tensor[2:]
    assert step.prefills.block_table.data_ptr() == rest.data_ptr()
    assert step.prefills.seq_lens.shape == (1,)
    assert step.prefills.max_seqlen_k == 50
    assert step.prefills.copies is not None
    copies = step.prefills.copies()
    assert copies.cu_seqlens_k.tolist() == [0, 30]
    assert step.prefills.copies() is copies  # made once for all layers
    step, first = build([0, 5, 9], [50, 30])
    assert step.decodes is None
    assert step.prefills.cu_seqlens_q.data_ptr() == first.query_start_loc.data_ptr()
    assert asked == [(16, 7), (16, 4)]  # new tokens of a request, on average
    step, _ = build([0, 1, 2, 2, 2], [50, 7, 0, 0])
    assert step.decodes.seq_lens.shape == (2,)
    assert step.prefills is None
    monkeypatch.setattr(vllm_backend, "page_kernels", lambda *facts: None)
    step, _ = build([0, 1, 2, 9], [50, 7, 30])
    assert step.decodes is not None
    assert step.prefills.cu_seqlens_k.tolist() == [0, 30]
    builder.has_kernels = False
    step, _ = build([0, 1, 2, 9], [50, 7, 30])
    assert step.decodes is None
    assert step.prefills.cu_seqlens_q.tolist() == [0, 1, 2, 9]
    assert step.prefills.cu_seqlens_k.tolist() == [0, 43, 50, 80]


def test_decoding_steps_are_told_without_their_lengths() -> None:
    """Nothing is read or counted on the host in a step of one new token each, in any class."""
    from spattention.serving.vllm_backend import BandMetadataBuilder

    builder = BandMetadataBuilder.__new__(BandMetadataBuilder)
    builder.has_kernels = True
    common = SimpleNamespace(
        num_reqs=2,
        max_query_len=1,
        seq_lens=torch.empty(4, dtype=torch.int32, device="meta"),
        block_table_tensor=torch.empty(4, 8, dtype=torch.int32, device="meta"),
    )
    step = builder.build(0, common).step  # type: ignore[arg-type]
    assert step.decodes is not None
    assert step.prefills is None
    assert step.decodes.seq_lens.shape == (2,)
    assert step.decodes.block_table.shape == (2, 8)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("captured", [True, False])
def test_classes_run_side_by_side(monkeypatch: Any, captured: bool, in_place: bool) -> None:
    """In captured steps, and where prompts are read in place; elsewhere one after the other, on the
    stream that vLLM launches on."""
    from spattention.serving.vllm_backend import BandAttentionImpl, ClassBands

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    streams, launched = SimpleNamespace(sides=[None], run=lambda classes: launched.append(2)), []
    bands = ClassBands(folders.FIRST.heads(0, 2), None, [0, 1], 0, (), (), streams)  # type: ignore
    attention = BandAttentionImpl(2, 16, 0.25, 1, bands=bands)
    attention._run([lambda: launched.append(1)] * 2, in_place)
    assert launched == ([2] if captured or in_place else [1, 1])


def test_the_first_class_computes_a_whole_layer(monkeypatch: Any) -> None:
    """vLLM calls one operator a layer: it stores every class's keys and fills every class's heads,
    each from its own cache, step and slots."""
    from spattention.serving import vllm_backend
    from spattention.serving.class_streams import ClassStreams
    from spattention.serving.paged import prefills_of

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 4, 16, generator=generator)
    key, value = torch.randn(2, 5, 2, 16, generator=generator).unbind()
    streams, names = ClassStreams(2, torch.device("cpu")), ("near", "far")
    contexts: dict[str, Any] = {}
    for index, block_size in enumerate((4, 8)):
        heads = [2 * index, 2 * index + 1]
        pattern = folders.FIRST.heads(2 * index, 2 * index + 2)
        bands = vllm_backend.ClassBands(pattern, None, heads, heads[0], names, (1, 0), streams)
        attention = vllm_backend.BandAttentionImpl(4, 16, 0.25, 2, bands=bands)
        table = torch.tensor([[2, 1, 0]], dtype=torch.int32)
        prefills = prefills_of([0, 5], [5], table, block_size, None)
        metadata = vllm_backend.BandMetadata(vllm_backend.Step(None, prefills))
        slots = torch.tensor([2 * block_size + p if p < block_size else p for p in range(5)])
        holder, cache = SimpleNamespace(impl=attention), torch.zeros(3, 1, block_size, 32)
        contexts[names[index]] = (metadata, holder, cache, slots)
    monkeypatch.setattr(vllm_backend, "get_attention_context", contexts.__getitem__)
    launched, attend = [], vllm_backend.attend

    def launch(query: Any, cache: Any, step: Any, pattern: Any, *rest: Any, **words: Any) -> None:
        launched.append(pattern)
        attend(query, cache, step, pattern, *rest, **words)

    monkeypatch.setattr(vllm_backend, "attend", launch)
    metadata, holder, cache, _ = contexts["near"]
    found = torch.full_like(query, torch.nan)
    holder.impl.forward(None, query, key, value, cache, metadata, found)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    wanted = spa.band_attention(q, k, v, folders.FIRST, scale=0.25)[0].transpose(0, 1)
    torch.testing.assert_close(found, wanted)
    assert launched == [folders.FIRST.heads(2, 4), folders.FIRST.heads(0, 2)]  # as `order` says
    no_metadata = holder.impl.forward(None, query, key, value, cache, None, found)
    assert not no_metadata.any()


def test_bands_matter_to_the_tokens(tmp_path: Path) -> None:
    """The models of these tests give other tokens where bands are lost or exchanged."""
    folder = folders.save(tmp_path / "banded")
    exchanged = folders.save(tmp_path / "other", patterns=(folders.SECOND, folders.FIRST))
    tokens = folders.greedy(folder, PROMPTS, NEW_TOKENS)
    assert all(
        a != b for a, b in zip(tokens[1:], folders.greedy(exchanged, PROMPTS, NEW_TOKENS)[1:])
    )


def test_blocks_are_freed_by_class_of_heads(tmp_path: Path) -> None:
    """A long request holds the blocks that the bands of each class of heads reach, no others."""
    length, heads, chunk, block_size = 2048, 8, 64, 16
    pattern = spa.BandPattern.shared_local(heads, length, widths="geometric", local=64)
    shape = {"num_attention_heads": heads, "num_key_value_heads": heads}
    folder = folders.save(tmp_path, patterns=(pattern, pattern), **shape)
    prompts = folders.prompts([length])
    (run,) = engine.generate_in_vllm(
        folder, [prompts], 8, max_model_len=2 * length, enable_prefix_caching=False
    )
    assert run["tokens"] == folders.greedy(folder, prompts, 8)

    (classes,) = head_classes([pattern], heads)
    assert len(classes) > 1
    largest = max(len(part.kv_heads) for part in classes)
    held = every = 0
    for part in classes:
        assert part.window is not None
        tokens = block_size * largest // len(part.kv_heads)  # pages are of one size
        held += -(-min(part.window + chunk, length) // tokens) + 1
        every += -(-length // tokens)
    assert run["most_blocks"] <= held + 1  # vLLM keeps one block unused
    assert held < 0.5 * every


def test_the_docs_state_the_blocks_of_a_long_request(tmp_path: Path) -> None:
    """`docs/serving.md`: one request of 8,192 tokens, eight heads, chunks of 256."""
    length, heads = 8192, 8
    found = {}
    for name, pattern in {
        "dense": spa.BandPattern.dense(heads, length),
        "uniform": spa.BandPattern.shared_local(heads, length),
        "geometric": spa.BandPattern.shared_local(heads, length, widths="geometric"),
    }.items():
        shape = {"num_attention_heads": heads, "num_key_value_heads": heads}
        shape["max_position_embeddings"] = 2 * length
        folder = folders.save(tmp_path / name, patterns=(pattern, pattern), **shape)
        settings = {"max_model_len": length + 16, "max_num_batched_tokens": 256}
        settings |= {"kv_cache_memory_bytes": 1 << 26, "enable_prefix_caching": False}
        (run,) = engine.generate_in_vllm(folder, [folders.prompts([length])], 8, **settings)
        (classes,) = head_classes([pattern], heads)
        found[name] = run["most_blocks"], max(len(part.kv_heads) for part in classes)
    assert found == {"dense": (514, 8), "uniform": (1329, 2), "geometric": (317, 4)}


def test_bad_folders_and_settings_end_at_start_up(tmp_path: Path) -> None:
    """Each with one line that says what to do, before a weight is read."""
    good = folders.save(tmp_path / "good")
    section = json.loads((good / "config.json").read_text())["spattention"]
    cases: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
        ({}, {}, None),
        (
            {"architectures": ["LlamaForCausalLM"]},
            {},
            "`architectures` of a model with bands must be ['SpattentionLlamaForCausalLM']",
        ),
        (
            {"architectures": ["SpattentionGemma3ForCausalLM"]},
            {},
            "the families that spattention serves, got ['SpattentionGemma3ForCausalLM']",
        ),
        ({"spattention": None}, {}, "the folder has lost its bands"),
        (
            {"spattention": section | {"version": 7}},
            {},
            "`config.spattention` must have version 1 (the one this library writes), got 7",
        ),
        ({"num_attention_heads": 2}, {}, "`pattern` has 4 heads but layer 0 of the model has 2"),
        (
            {},
            {"kv_cache_dtype": "fp8"},
            "`kv_cache_dtype` must be one of ('auto', 'float16', 'bfloat16', 'float32') for",
        ),
        ({}, {"kv_cache_dtype": "bfloat16"}, "must be 'auto' or the model's 'float32' for"),
        ({}, {"model_impl": "transformers"}, "`model_impl` must be 'auto' or 'vllm' for"),
        ({}, {"kv_offloading_size": 1.0}, "`kv_offloading_size` must be None for"),
        (
            {},
            {"speculative_config": NGRAM},
            "`speculative_config` must be None for spattention, got SpeculativeConfig",
        ),
        (
            {},
            {"tensor_parallel_size": 3},
            "`tensor_parallel_size` must divide the model's 4 query heads, got 3",
        ),
        # A stock model is none of this library's business.
        ({"architectures": ["LlamaForCausalLM"], "spattention": None}, {}, None),
    ]
    starts = []
    for index, (entries, settings, _) in enumerate(cases):
        folder = shutil.copytree(good, tmp_path / str(index))
        folders.edit(folder, **entries)
        starts.append((folder, settings))
    for (_, _, message), error in zip(cases, engine.start_errors(starts)):
        if message is None:
            assert error is None
        else:
            assert error is not None
            assert message in error


def test_weights_of_other_bands_are_refused(tmp_path: Path) -> None:
    """A config that was edited names other bands than the weights were trained with."""
    good = folders.save(tmp_path / "good")
    section = json.loads((good / "config.json").read_text())["spattention"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": [1, 0]}, "with the attention that they were saved from"),
        (
            {"layers": [0, None]},
            'model.layers.1.self_attn.spattention_mark, of torch.float32, got "none"',
        ),
        ({"sinks": True}, "model.layers.0.self_attn.sinks"),
    ]
    for index, (entries, message) in enumerate(cases):
        folder = shutil.copytree(good, tmp_path / str(index))
        folders.edit(folder, spattention=section | entries)
        with pytest.raises(AssertionError) as raised:
            engine.generate_in_vllm(folder, [PROMPTS], 1)
        assert message in str(raised.value)


def test_vllm_without_the_plugin_refuses_bands(tmp_path: Path) -> None:
    """vLLM's own registry does not know the name that a band model's folder gives."""
    folder = folders.save(tmp_path)
    (error,) = engine.start_errors([(folder, {})], VLLM_PLUGINS="")
    assert error is not None
    assert "Model architectures ['SpattentionLlamaForCausalLM'] are not supported for now" in error
