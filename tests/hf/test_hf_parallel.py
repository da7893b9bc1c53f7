"""Rows that are split over ranks: refused where attention would see a rank's own part alone."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from tiny import FIRST, HEADS, SPAN, banded, build, logits, tokens
from torch.distributed.tensor.experimental import context_parallel

import spattention as spa
from spattention import baselines
from spattention.hf.packing import PACKING

MATCH = r'attn_implementation="{}" must not run under `context_parallel` \(or Accelerate'


@pytest.fixture
def mesh(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def split(mesh, *rows):
    return context_parallel(mesh, buffers=list(rows), buffer_seq_dims=[1] * len(rows))


@pytest.mark.parametrize("name", ["spattention", "bigbird"])
def test_context_parallel_is_refused(name, mesh):
    chosen = baselines.BigBird(HEADS, SPAN)
    model = banded("llama") if name == "spattention" else baselines.apply(build("llama"), chosen)
    ids, positions = tokens(1, 16), torch.arange(16)[None]
    before = logits(model, ids)
    with split(mesh, ids, positions), pytest.raises(NotImplementedError, match=MATCH.format(name)):
        model(ids, position_ids=positions)
    assert torch.equal(logits(model, ids), before)


def test_context_parallel_is_refused_in_training(mesh):
    model, ids = banded("llama").train(), tokens(1, 16)
    with split(mesh, ids), pytest.raises(NotImplementedError, match=MATCH.format("spattention")):
        model(ids, labels=ids)


def test_a_compiled_model_refuses_context_parallel(mesh):
    """Compiled inside the context or before it: the graph is not run there."""
    torch._dynamo.reset()
    ids = tokens(1, 16)
    before, within = (torch.compile(banded("llama"), backend="eager") for _ in range(2))
    wanted = logits(before, ids)
    for model in (before, within):
        with split(mesh, ids), pytest.raises(NotImplementedError, match="`context_parallel`"):
            model(ids)
    assert torch.equal(logits(before, ids), wanted)


def test_a_loaded_model_refuses_context_parallel(mesh, tmp_path):
    banded("llama", (FIRST, None)).save_pretrained(tmp_path)
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens(1, 16)
    with split(mesh, ids), pytest.raises(NotImplementedError, match=MATCH.format("spattention")):
        model(ids)


def test_bands_split_rows_by_their_context_parallel(mesh):
    """The refusal names it; it serves the same model, and PyTorch's around it still raises."""
    model, ids = banded("llama"), tokens(1, 16)
    wanted = logits(model, ids)
    spa.hf.context_parallel(model, mesh)
    assert torch.equal(logits(model, ids), wanted)
    with (
        split(mesh, ids),
        pytest.raises(NotImplementedError, match=r"`spattention\.hf\.context_parallel`"),
    ):
        model(ids)
    spa.hf.context_parallel(model, None)
    assert torch.equal(logits(model, ids, use_cache=True), wanted)


def test_another_attention_of_torch_is_no_split(monkeypatch):
    """Libraries that replace `scaled_dot_product_attention` as a whole are no reason to refuse."""
    model, ids = banded("llama"), tokens(1, 16)
    wanted = logits(model, ids)
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: attend(*a, **k)
    )
    assert torch.equal(logits(model, ids), wanted)


def offsets(*starts, keys=None, longest=16):
    q, k = (torch.tensor(each, dtype=torch.int32) for each in (starts, keys or starts))
    return dict(zip(PACKING, (q, k, longest, longest)))


ONES = torch.ones(1, 16, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (offsets(0, 9, 5, 16), "`cu_seqlens_q` must never decrease, got 9 then 5"),
        (offsets(2, 16), "`cu_seqlens_q` must start at 0, got 2"),
        (offsets(0, 9), "`cu_seqlens_q` must end at the number of tokens, 16, got 9"),
        (offsets(0, 16, keys=(0, 9, 16)), "must name the same documents, got 1 and 2"),
        (offsets(0, 16, longest=3), "`max_seqlen_q` must be at least the longest document, 16"),
        ({PACKING[1]: torch.tensor([0, 16])}, r"`cu_seq_lens_q` must come with all of .*got no \["),
        (
            {**offsets(0, 16), PACKING[0]: torch.tensor([0.0, 16.5])},
            "must be a tensor of whole num",
        ),
        (
            {**offsets(0, 9, 16), "attention_mask": ONES},
            "`attention_mask` must be None with `cu_seq",
        ),
        ({"attention_mask": ONES[:, :9]}, "`attention_mask` must cover all 16 tokens so far"),
        ({"attention_mask": ONES.expand(2, -1)}, "must have a row for each of the 1 of the batch"),
        (
            {"attention_mask": ONES[None, None].bool()},
            "`attention_mask` must be .*a 2-D padding mask",
        ),
    ],
)
def test_bad_rows_are_refused_as_if_alone(mesh, given, message):
    """With the same words under `context_parallel` as without it."""
    model, ids = banded("llama"), tokens(1, 16)
    for where in (None, mesh):
        spa.hf.context_parallel(model, where)
        with pytest.raises(ValueError, match=message):
            model(ids, **given)


@pytest.mark.parametrize("padded", [False, True])
def test_restarts_are_read_as_if_alone(mesh, padded):
    """Documents of their own, or next to an `attention_mask` one text, with a warning."""
    model, ids = banded("llama"), tokens(1, 16)
    given = {"position_ids": (torch.arange(16) % 10)[None]}
    given |= {"attention_mask": ONES} if padded else {}
    found = []
    for where in (None, mesh):
        spa.hf.context_parallel(model, where)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(logits(model, ids, **given))
        assert padded == any("`position_ids` restart in a row" in str(w.message) for w in caught)
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def test_packed_rows_are_split_as_if_alone(mesh):
    model, ids = banded("llama"), tokens(1, 16)
    wanted = logits(model, ids, **offsets(0, 9, 9, 16))
    spa.hf.context_parallel(model, mesh)
    found = logits(model, ids, **offsets(0, 9, 9, 16))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": [[2, 3]]}, "`input_ids` must be a tensor, got list"),
        ({"input_ids": ONES[0]}, r"`input_ids` must be \[B, tokens\] .*, got shape \[16\]"),
        ({"labels": [[2] * 16]}, "`labels` must be a tensor, got list"),
        ({"labels": ONES[:, :9]}, r"`labels` must be \[1, 16\] .*, got shape \[1, 9\]"),
        ({"position_ids": torch.arange(16)}, r"`position_ids` must be \[1, 16\]"),
        ({"attention_mask": [[1] * 16]}, "`attention_mask` must be a tensor, got list"),
    ],
)
def test_inputs_that_cannot_be_split_are_named(mesh, given, message):
    model = spa.hf.context_parallel(banded("llama"), mesh)
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": ONES + 1, **given})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.set_attn_implementation("sdpa"), 'got "sdpa" in layer 0'),
        (lambda m: spa.hf.apply(m, [FIRST, None]), "every attention layer .*, got none in layer 1"),
        (
            lambda m: spa.hf.apply(m, FIRST, layers=[1]),
            "every attention layer .*got none in layer 0",
        ),
        (lambda m: setattr(m.model, "layers", banded("llama").model.layers), "another layer 0"),
    ],
)
def test_layers_changed_after_the_split_are_named(mesh, change, message):
    """They would attend a rank's own tokens alone; taken away, the split no longer matters."""
    model = spa.hf.context_parallel(banded("llama"), mesh)
    change(model)
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 16))
    spa.hf.context_parallel(model, None)
    assert model(tokens(1, 16)).logits.shape[1] == 16


def test_a_failed_second_split_changes_nothing(mesh):
    model, ids = banded("llama"), tokens(1, 16)
    wanted = logits(model, ids)
    spa.hf.context_parallel(model, mesh)
    with pytest.raises(ValueError, match="`mesh` must be a one-dimensional DeviceMesh"):
        spa.hf.context_parallel(model, "cp")
    assert torch.equal(logits(model, ids), wanted)


def test_a_copy_stays_under_context_parallel(mesh):
    """In the same group, with hooks of its own, which it can take away by itself."""
    model, ids = spa.hf.context_parallel(banded("llama"), mesh), tokens(1, 12)
    copied = copy.deepcopy(model)
    wanted = banded("llama")(ids, labels=ids)
    for each in (model, copied):
        torch.testing.assert_close(each(ids, labels=ids).loss, wanted.loss)
    spa.hf.context_parallel(copied, None)
    past = transformers.DynamicCache(config=copied.config)
    copied(ids, past_key_values=past)
    assert past.get_seq_length() == 12, "alone, it fills a cache"
    assert copied._forward_pre_hooks.keys() < model._forward_pre_hooks.keys()
    torch.testing.assert_close(model(ids, labels=ids).loss, wanted.loss)


def test_pickling_under_context_parallel_is_named(mesh, tmp_path):
    model = spa.hf.context_parallel(banded("llama"), mesh)
    for save in (pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
        with pytest.raises(TypeError, match=r"not be pickled under `context_parallel`.*got one of"):
            save(model)
    spa.hf.context_parallel(model, None)
    ids = tokens(1, 9)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
