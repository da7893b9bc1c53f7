"""Padding anywhere in a row: the logits and texts of each row alone, without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny import (
    COMMON,
    EXACT,
    FAMILIES,
    FIRST,
    GROUPED,
    HEADS,
    SECOND,
    P,
    banded,
    build,
    logits,
    tokens,
)
from torch._dynamo.testing import CompileCounter

import spattention as spa

close = torch.testing.assert_close
LENGTH = 23
KINDS = ("none", "dynamic", "static", "band")
# A second turn of a batched dialogue, holes of any size, right padding, and a row of padding alone.
MASK = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
        [0] * LENGTH,
        [1] * LENGTH,
    ]
)


def make_cache(kind: str, model: Any, length: int = LENGTH + 5) -> Any:
    if kind == "none":
        return None
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=length)
    if kind == "band":
        return spa.hf.BandCache(model.config)
    return transformers.DynamicCache(config=model.config)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def rows_alone(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of every row without its padding, `[tokens, V]`."""
    rows = [row[real.bool()][None] for row, real in zip(ids, mask) if real.any()]
    return torch.cat([logits(model, row, use_cache=False)[0] for row in rows])


def in_pieces(model: Any, ids: torch.Tensor, mask: torch.Tensor, pieces: Any, cache: Any) -> Any:
    positions, found, end = positions_of(mask), [], 0
    for piece in ids.split(pieces, dim=1):
        start, end = end, end + piece.shape[1]
        keywords = {"position_ids": positions[:, start:end], "attention_mask": mask[:, :end]}
        keywords |= {"use_cache": False} if cache is None else {"past_key_values": cache}
        found.append(logits(model, piece, **keywords))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("pieces", [[LENGTH], [9, 1, 1, 6, 1, 5], [1] * LENGTH], ids=len)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_each_row_alone(family, kind, pieces):
    if kind == "none" and len(pieces) > 1:
        pytest.skip("pieces need a cache")
    model, ids = banded(family, sinks=True), tokens(len(MASK), LENGTH)
    found = in_pieces(model, ids, MASK, pieces, make_cache(kind, model))
    close(found[MASK.bool()], rows_alone(model, ids, MASK), **EXACT)


def test_gradients_are_those_of_each_row_alone():
    ids = tokens(len(MASK), LENGTH)
    padded, alone = banded("llama", sinks=True), banded("llama", sinks=True)
    weight = torch.linspace(-1, 1, 61, dtype=torch.float64)
    out = padded(ids, attention_mask=MASK, position_ids=positions_of(MASK)).logits
    (out * weight).square()[MASK.bool()].sum().backward()
    for row, real in zip(ids, MASK):
        if real.any():
            out = alone(row[real.bool()][None]).logits
            (out * weight).square().sum().backward()
    wanted = dict(alone.named_parameters())
    for name, parameter in padded.named_parameters():
        close(parameter.grad, wanted[name].grad, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_what_padding_holds_never_matters(kind):
    """NaN in it, and in the part of a static cache that is not filled yet."""
    model, ids = banded("llama", sinks=True), tokens(len(MASK), LENGTH)
    wanted = rows_alone(model, ids, MASK)
    layers = model.model.layers

    def poison(module, args, keywords):
        hidden = args[0] if args else keywords["hidden_states"]
        at = slice(start, start + hidden.shape[1])
        hidden = hidden.masked_fill(~MASK[:, at, None].bool(), torch.nan)
        return (hidden, *args[1:]), {k: v for k, v in keywords.items() if k != "hidden_states"}

    handles = [m.self_attn.register_forward_pre_hook(poison, with_kwargs=True) for m in layers]
    cache, start, found = make_cache(kind, model), 0, []
    for piece in [ids] if cache is None else ids.split([12, 1, 10], dim=1):
        end = start + piece.shape[1]
        found.append(
            logits(
                model,
                piece,
                attention_mask=MASK[:, :end],
                position_ids=positions_of(MASK)[:, start:end],
                past_key_values=cache,
                use_cache=cache is not None,
            )
        )
        if kind == "static":
            for layer in cache.layers:
                layer.keys[:, :, end:], layer.values[:, :, end:] = torch.nan, torch.nan
        start = end
    for handle in handles:
        handle.remove()
    real = MASK.bool()
    real[1, 17:] = False  # tokens before padding at the right end, in one call with it
    close(torch.cat(found, dim=1)[real], wanted[real[MASK.bool()]], **EXACT)


def answers(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any, **options: Any) -> None:
    """What follows each row of a batch is what follows it alone."""
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    keep = {"use_cache": False} if cache is None else {"past_key_values": cache}
    found = model.generate(ids, attention_mask=mask, **keep, **settings)
    settings.pop("prefill_chunk_size", None)
    for row, real in enumerate(mask.bool()):
        alone = ids[row][real][None]
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **settings)
        assert found[row, -4:].tolist() == wanted[0, -4:].tolist()


@pytest.mark.parametrize("chunk", [None, 5, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_second_turn_of_a_batch_of_dialogues(family, kind, chunk):
    if kind == "none" and chunk is not None:
        pytest.skip("chunks need a cache")
    model = banded(family, sinks=True)
    first, second = tokens(2, 9), tokens(2, 7, seed=1)
    masks = [torch.ones_like(t) for t in (first, second)]
    masks[0][1, :4], masks[1][0, :5] = 0, 0
    cache = make_cache(kind, model, 40)
    keep = {"use_cache": False} if cache is None else {"past_key_values": cache}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    turn = model.generate(first, attention_mask=masks[0], **keep, **settings)
    ids = torch.cat([turn, second], dim=1)
    mask = torch.cat([masks[0], torch.ones(2, 4, dtype=torch.long), masks[1]], dim=1)
    answers(model, ids, mask, cache, prefill_chunk_size=chunk, disable_compile=True)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_after_padding_between_tokens(kind):
    model, rows = banded("llama"), [0, 2, 4]  # those that end with a token
    answers(model, tokens(3, LENGTH), MASK[rows], make_cache(kind, model), num_beams=3)


@pytest.mark.parametrize("kind", ["dynamic", "band"])
def test_drafts_after_padding_between_tokens(kind):
    model, helper = banded("llama"), build("llama", seed=1)
    ids = tokens(1, 14)
    mask = torch.ones_like(ids)
    mask[0, 4:7] = 0
    for drafts in ({"assistant_model": helper}, {"prompt_lookup_num_tokens": 3}):
        cache = make_cache(kind, model)
        alone = ids[mask.bool()][None]
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        found = model.generate(ids, attention_mask=mask, past_key_values=cache, **options, **drafts)
        assert found[0, -20:].tolist() == wanted[0, -20:].tolist()


@pytest.mark.parametrize("kind", ["dynamic", "band"])
def test_a_padded_cache_is_cropped_and_repeated(kind):
    """A cache with padding is cropped split and repeated."""
    model, ids = banded("llama"), tokens(len(MASK), LENGTH)
    cache = make_cache(kind, model)
    in_pieces(model, ids[:, :17], MASK[:, :17], [17], cache)
    cache.crop(-8)
    cache.batch_select_indices(torch.tensor([2, 0, 3]))
    cache.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0, 3, 3]
    some = {"attention_mask": MASK[rows], "position_ids": positions_of(MASK)[rows, 9:]}
    found = logits(model, ids[rows, 9:], past_key_values=cache, **some)
    wanted = torch.zeros(len(rows), LENGTH, 61, dtype=torch.float64)
    wanted[MASK[rows].bool()] = rows_alone(model, ids[rows], MASK[rows])
    real = MASK[rows, 9:].bool()
    close(found[real], wanted[:, 9:][real], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_from_right_padding(kind):
    """Transformers takes the first token from the last column, padding or not; from then on padding
    lies between tokens."""
    model, ids = banded("llama"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    positions = positions_of(mask)
    cache = make_cache(kind, model)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    keep = {"use_cache": False} if cache is None else {"past_key_values": cache}
    found = model.generate(ids, attention_mask=mask, position_ids=positions, **keep, **settings)
    for row, real in enumerate((5, 9)):
        text = torch.cat([ids[row, :real], found[row, 9:]])[None]
        # As `generate` counts on: from the position in the last column.
        at = torch.cat([positions[row, :real], positions[row, -1] + torch.arange(1, 7)])[None]
        ones = torch.ones_like(text)
        plain = logits(model, text, position_ids=at, attention_mask=ones, use_cache=False)
        assert found[row, 10:].tolist() == plain[0, real:-1].argmax(dim=-1).tolist()


def test_layers_left_alone_see_no_padding():
    """Their own attention, in SDPA and eager; exact where the other layers are."""
    ids = tokens(len(MASK), LENGTH)
    for own, patterns in (
        ("sdpa", (None, SECOND)),
        ("eager", (None, SECOND)),
        ("sdpa", (FIRST, None)),
    ):
        tolerance = EXACT if own == "sdpa" else {"rtol": 0.0, "atol": 2e-5}
        model = spa.hf.apply(build("llama", own), patterns)
        wanted = rows_alone(model, ids, MASK)
        for kind in KINDS:
            pieces = [LENGTH] if kind == "none" else [9, 1, 13]
            found = in_pieces(model, ids, MASK, pieces, make_cache(kind, model))
            close(found[MASK.bool()], wanted, **tolerance)


def test_own_windows_count_padding():
    """Own sliding windows count padding as in Transformers."""
    ids = tokens(len(MASK), LENGTH)
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    config = transformers.Qwen2Config(**COMMON, **GROUPED, **windows, initializer_range=0.2)
    torch.manual_seed(0)
    stock = transformers.Qwen2ForCausalLM(config).double().eval()
    model = spa.hf.apply(copy.deepcopy(stock), P.dense(HEADS, 64), layers=[0])
    for kind in KINDS:
        for pieces in [[LENGTH]] if kind == "none" else [[LENGTH], [9, 1, 13], [1] * LENGTH]:
            found = in_pieces(model, ids, MASK, pieces, make_cache(kind, model))
            other = make_cache("dynamic" if kind == "band" else kind, stock)
            wanted = in_pieces(stock, ids, MASK, pieces, other)
            close(found[MASK.bool()], wanted[MASK.bool()], rtol=0.0, atol=1e-9)


def test_padding_is_taken_out_in_one_graph():
    """Values of a mask are not read there: one graph serves every mask."""
    model, ids = banded("llama", sinks=True), tokens(len(MASK), LENGTH)
    graphs = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend=graphs, dynamic=False)
    left = torch.ones_like(MASK)
    left[0, :7] = 0
    for mask in (MASK, left, torch.ones_like(MASK)):
        some = {"attention_mask": mask, "position_ids": positions_of(mask), "use_cache": False}
        with torch.no_grad():
            found = step(ids, **some).logits
        close(found[mask.bool()], rows_alone(model, ids, mask), **EXACT)
    assert graphs.frame_count == 1


def test_training_with_padding_compiles():
    model, twin = (banded("llama", sinks=True) for _ in range(2))
    torch._dynamo.reset()
    step = torch.compile(twin, fullgraph=True, backend="aot_eager")
    ids = tokens(len(MASK), LENGTH)
    some = {"attention_mask": MASK, "position_ids": positions_of(MASK), "use_cache": False}
    for net in (model, step):
        net(ids, **some).logits[MASK.bool()].square().sum().backward()
    for expected, found in zip(model.parameters(), twin.parameters(), strict=True):
        close(found.grad, expected.grad, rtol=1e-10, atol=1e-8)


def test_decoding_after_padding_is_one_graph():
    """As `generate` compiles it: masks are made outside the graph."""
    model, ids = banded("llama"), tokens(len(MASK), LENGTH)
    cache = make_cache("static", model)
    found = [in_pieces(model, ids[:, :16], MASK[:, :16], [16], cache)]
    graphs = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend=graphs, dynamic=False)
    for at in range(16, LENGTH):
        rows = spa.hf.mask.rows_mask(
            len(ids),
            1,
            LENGTH + 5,
            torch.tensor(at),
            attention_mask=MASK[:, : at + 1],
            config=model.config,
        )
        some = {"attention_mask": rows, "position_ids": positions_of(MASK)[:, at : at + 1]}
        with torch.no_grad():
            found.append(step(ids[:, at : at + 1], past_key_values=cache, **some).logits)
    wanted = rows_alone(model, ids, MASK)
    close(torch.cat(found, dim=1)[MASK.bool()], wanted, **EXACT)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("kind", ["static", "band"])
def test_masks_made_in_the_graph_may_hold_padding(kind):
    model, ids = banded("llama", sinks=True), tokens(len(MASK), LENGTH)
    cache = make_cache(kind, model)
    found = [in_pieces(model, ids[:, :16], MASK[:, :16], [16], cache)]
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    for at in range(16, LENGTH):
        some = {
            "attention_mask": MASK[:, : at + 1].contiguous(),
            "position_ids": positions_of(MASK)[:, at : at + 1].contiguous(),
        }
        with torch.no_grad():
            found.append(step(ids[:, at : at + 1], past_key_values=cache, **some).logits)
    close(torch.cat(found, dim=1)[MASK.bool()], rows_alone(model, ids, MASK), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_that_fit_no_text_are_refused(family):
    model, ids = banded(family), tokens(2, 8)
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    for rows, columns, message in (
        (2, 8, r"must cover all 16 tokens so far, those in the cache included, got 8 columns"),
        (3, 16, "must have a row for each of the 2 of the batch, got 3"),
    ):
        mask = torch.ones(rows, columns, dtype=torch.long)
        with pytest.raises(ValueError, match=f"`attention_mask` {message}"):
            logits(model, ids, past_key_values=cache, attention_mask=mask)


def test_without_padding_between_tokens_nothing_moves(monkeypatch):
    """Left padding, right padding and none leave keys where they are."""
    model, ids = banded("llama"), tokens(2, 12)
    wanted = rows_alone(model, ids, torch.ones_like(ids))

    def refuse(*_):
        raise AssertionError("nothing is to be moved")

    for name in ("reorder", "restore"):
        monkeypatch.setattr(spa.hf.attention, name, refuse)
    for side in (slice(0, 0), slice(0, 5), slice(7, 12)):
        mask = torch.ones_like(ids)
        mask[1, side] = 0
        for kind in KINDS:
            pieces = [12] if kind == "none" else [3, 8, 1]
            found = in_pieces(model, ids, mask, pieces, make_cache(kind, model))
            close(found[0], wanted[:12], **EXACT)


def test_a_mask_may_reach_beyond_the_tokens():
    """As for a static cache that is to be filled: later columns change nothing."""
    model, ids = banded("llama"), tokens(len(MASK), 12)
    wanted = rows_alone(model, ids, MASK[:, :12])
    positions = positions_of(MASK[:, :12])
    cache = make_cache("static", model, LENGTH)
    found = logits(model, ids, attention_mask=MASK, position_ids=positions, past_key_values=cache)
    close(found[MASK[:, :12].bool()], wanted, **EXACT)


def test_padding_moves_to_the_left_and_back():
    from spattention.padding import padding_first, reorder, restore

    order = padding_first(MASK.bool())
    assert MASK.gather(1, order).diff(dim=1).min() >= 0
    assert order[0, :6].tolist() == [0, 1, 2, 8, 9, 16]
    rows = torch.randn(len(MASK), 2, LENGTH, 3, dtype=torch.float64, requires_grad=True)
    close(restore(reorder(rows, order), order), rows, rtol=0.0, atol=0.0)
    assert torch.autograd.gradcheck(lambda t: reorder(t, order).square(), rows)
