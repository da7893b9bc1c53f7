"""The operators' meaning, on every implementation that runs on the CPU."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import spattention as spa
from spattention import BandPattern
from spattention.testing import Case, check_case, check_error, exact, plain, run
from tests.views import VIEWS, check_view

IMPLEMENTATIONS = ["reference", "blockwise"]
HEADS = 4
PATTERNS = {
    "exclusive": BandPattern.exclusive(HEADS, 100),
    "shared_local": BandPattern.shared_local(HEADS, 100),
    "geometric": BandPattern.shared_local(HEADS, 90, widths="geometric", local=7, first=3),
    "gapped": BandPattern.gapped(HEADS, 61),
    "dense": BandPattern.dense(HEADS, 64),
    "more heads than tokens": BandPattern.exclusive(HEADS, 3),
    "one empty head": BandPattern((((0, 5),), (), ((2, 3),), ((0, 1), (90, 100))), span=100),
    "prefix": BandPattern.shared_local(HEADS, 100, prefix=5),
    "prefix of the whole span": BandPattern.exclusive(HEADS, 70, prefix=70),
    "prefix, one empty head": BandPattern(
        (((3, 5),), (), ((0, 3),), ((0, 1), (60, 61))), span=100, prefix=17
    ),
}
impls = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def rows(queries=130, keys=130, *, pattern=None, dtype=torch.float32, key_heads=HEADS, **options):
    pattern = pattern or PATTERNS["shared_local"]
    if "sinks" in options:
        options["sinks"] = draw(HEADS, seed=3).to(dtype)
    return Case(
        draw(2, HEADS, queries, 16, dtype=dtype),
        draw(2, key_heads, keys, 16, seed=1, dtype=dtype),
        draw(2, key_heads, keys, 16, seed=2, dtype=dtype),
        pattern,
        options,
    )


def documents(lengths_q, lengths_k, pattern="shared_local", **options):
    offsets = [index(0, *torch.tensor(n).cumsum(0).tolist()) for n in (lengths_q, lengths_k)]
    cu = {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1]}
    longest = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    return Case(
        draw(sum(lengths_q), HEADS, 16),
        draw(sum(lengths_k), 2, 16, seed=1),
        draw(sum(lengths_k), 2, 16, seed=2),
        PATTERNS[pattern],
        cu | longest | options,
    )


CASES = {
    **{f"pattern {name}": rows(pattern=pattern, sinks=True) for name, pattern in PATTERNS.items()},
    "no sinks": rows(),
    "grouped queries": rows(key_heads=2),
    "one key head": rows(key_heads=1, sinks=True),
    "fewer queries": rows(queries=37, keys=211),
    "one query": rows(queries=1, keys=99, sinks=True),
    "query_start": rows(queries=40, keys=150, query_start=71),
    "query_start on the device": rows(queries=40, keys=150, query_start=index(71)[0]),
    "query_start per row": rows(queries=40, keys=150, query_start=index(7, 110), sinks=True),
    "queries past the keys": rows(queries=20, keys=150, query_start=200),
    "left padding": rows(key_start=index(0, 57)),
    "key_start out of range": rows(key_start=index(-3, 400), sinks=True),
    "documents in a row": rows(
        key_start=torch.stack(
            [index(*[0] * 50 + [50] * 1 + [51] * 79), index(*[13] * 20 + [20] * 110)]
        ),
        sinks=True,
    ),
    "prefix, left padding": rows(
        pattern=PATTERNS["prefix"], key_start=index(-3, 57), sinks=True, key_heads=2
    ),
    "prefix, documents in a row": rows(
        pattern=PATTERNS["prefix, one empty head"],
        key_start=torch.stack(
            [index(*[0] * 50 + [50] * 3 + [53] * 77), index(*[13] * 20 + [20] * 110)]
        ),
    ),
    "prefix, query_start per row": rows(
        queries=40, keys=150, query_start=index(7, 110), pattern=PATTERNS["prefix"]
    ),
    "prefix, queries past the keys": rows(
        queries=20, keys=150, query_start=200, pattern=PATTERNS["prefix of the whole span"]
    ),
    "scale": rows(scale=-0.7),
    "packed documents": documents([60, 1, 0, 70], [60, 1, 0, 70]),
    "packed, more keys": documents([50, 3, 0, 40], [90, 3, 5, 47], sinks=draw(HEADS)),
    "prefix, packed": documents([50, 3, 0, 40], [90, 3, 5, 47], pattern="prefix"),
    "bfloat16": rows(dtype=torch.bfloat16, sinks=True),
    "float16": rows(dtype=torch.float16, key_heads=2),
    "float64": rows(dtype=torch.float64, sinks=True),
}


@impls
@pytest.mark.parametrize("name", CASES)
def test_every_output_and_gradient_against_float64(name, impl):
    check_case(CASES[name], impl=impl)


@impls
def test_long_slices_are_split(impl):
    pattern = BandPattern(intervals=(((0, 5000),),), span=5000)
    shape = (1, 1, 2600, 4)
    case = Case(draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2), pattern)
    check_case(case, impl=impl)


@impls
def test_value_head_dim_may_differ(impl):
    case = rows()
    case = replace(case, value=draw(2, HEADS, 130, 5))
    check_case(case, impl=impl)


def test_the_reference_is_the_mask_and_a_softmax():
    case = rows(queries=20, keys=30)
    mask = case.pattern.mask(20, 30)
    scores = (case.query @ case.key.mT / 4).masked_fill(~mask, -math.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ case.value
    out = spa.band_attention(case.query, case.key, case.value, case.pattern, impl="reference")
    torch.testing.assert_close(out, expected)


@impls
def test_dense_is_scaled_dot_product_attention(impl):
    case = rows(pattern=BandPattern.dense(HEADS, 1000))
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.query, case.key, case.value, is_causal=True
    )
    out = spa.band_attention(case.query, case.key, case.value, case.pattern, impl=impl)
    torch.testing.assert_close(out, expected)


@impls
@pytest.mark.parametrize(
    ("name", "edited"), [("shared_local", 40), ("prefix", 3), ("prefix, one empty head", 16)]
)
def test_an_edit_changes_later_outputs_alone(impl, name, edited):
    """The published code hands its kernel heads for tokens, and fails this."""
    pattern = PATTERNS[name]
    case = rows(pattern=pattern)
    before = run(case, impl=impl)["out"]
    for name in ("key", "value"):
        changed = getattr(case, name).clone()
        changed[:, :, edited] += 1.0
        after = run(Case(**{**vars(case), name: changed}), impl=impl)["out"]
        moved = (after != before).any(dim=3)  # [B, H, Q]
        seen = pattern.mask(130)[:, :, edited]
        # One key alone has weight 1 whatever its score.
        alone = (pattern.mask(130).sum(-1) == 1) if name == "key" else torch.zeros_like(seen)
        assert torch.equal(moved, (seen & ~alone).expand(2, -1, -1))


@impls
def test_empty_rows(impl):
    """Empty rows give zero minus infinity and no gradient."""
    pattern = BandPattern(intervals=(((3, 5),), ()), span=8)
    query, key, value = (draw(1, 2, 6, 4, seed=s).requires_grad_() for s in range(3))
    out, lse = spa.band_attention(query, key, value, pattern, return_lse=True, impl=impl)
    assert (out[0, 0, :3] == 0).all()
    assert (out[0, 1] == 0).all()
    assert (lse[0, 0, :3] == -math.inf).all()
    assert (lse[0, 1] == -math.inf).all()
    grads = torch.autograd.grad(
        [out, lse], [query, key, value], [torch.ones_like(out), torch.ones_like(lse)]
    )
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][0, 0, :3] == 0).all()
    assert all((grad[0, 1] == 0).all() for grad in grads)


@impls
def test_empty_row_with_sink(impl):
    """An empty row with a sink has its logit and passes the gradient to it alone."""
    pattern = BandPattern(intervals=((),), span=8)
    tensors = [draw(1, 1, 3, 4, seed=s).requires_grad_() for s in range(3)]
    sinks = torch.tensor([0.7], requires_grad=True)
    out, lse = spa.band_attention(*tensors, pattern, sinks=sinks, return_lse=True, impl=impl)
    torch.testing.assert_close(lse, torch.full((1, 1, 3), 0.7))
    grads = torch.autograd.grad(
        [out, lse], [*tensors, sinks], [torch.ones_like(out), torch.ones_like(lse)]
    )
    torch.testing.assert_close(grads[3], torch.tensor([3.0]))
    assert all((grad == 0).all() for grad in grads[:3])
    assert (out == 0).all()


@impls
def test_keys_after_the_last_query_are_never_read(impl):
    case = rows(queries=10, keys=80, query_start=index(30, 44))
    poisoned = case.key.clone(), case.value.clone()
    for tensor in poisoned:
        tensor[0, :, 40:] = math.nan
        tensor[1, :, 54:] = math.nan
    clean = run(case, impl=impl)["out"]
    out = run(Case(case.query, *poisoned, case.pattern, case.options), impl=impl)["out"]
    assert torch.equal(out, clean)


@impls
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("view", VIEWS)
def test_any_memory_order_gives_the_same(view, place, impl):
    check_view(view, place, impl)


@impls
def test_strides_and_dtype_follow_the_query(impl):
    fused = draw(2, 50, 3, HEADS, 16)
    query, key, value = (t.transpose(1, 2) for t in fused.unbind(2))
    pattern = PATTERNS["exclusive"]
    out = spa.band_attention(query, key, value, pattern, impl=impl)
    assert out.transpose(1, 2).is_contiguous()
    expected = spa.band_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), pattern, impl=impl
    )
    assert expected.is_contiguous()
    torch.testing.assert_close(out, expected)


@impls
def test_gradient_of_expanded_keys(impl):
    """Expanded keys get the gradient of what they were expanded from."""
    pattern = PATTERNS["shared_local"]
    query, value = draw(2, HEADS, 30, 16), draw(2, HEADS, 30, 16, seed=2)
    key = draw(2, 1, 30, 16, seed=1).requires_grad_()
    spa.band_attention(
        query, key.expand(-1, HEADS, -1, -1), value, pattern, impl=impl
    ).sum().backward()
    shared = key.grad.clone()
    key.grad = None
    spa.band_attention(
        query, key.repeat(1, HEADS, 1, 1), value, pattern, impl=impl
    ).sum().backward()
    torch.testing.assert_close(shared, key.grad)


@impls
@pytest.mark.parametrize("name", ["shared_local", "prefix"])
def test_packed_documents_equal_separate_ones(name, impl):
    lengths = [30, 1, 64]
    case = documents(lengths, lengths, pattern=name)
    together = run(case, impl=impl)
    at = 0
    for length in lengths:
        part = slice(at, at + length)
        tensors = [t[part].transpose(0, 1)[None] for t in (case.query, case.key, case.value)]
        alone = run(Case(*tensors, case.pattern), impl=impl)
        torch.testing.assert_close(together["out"][part].transpose(0, 1)[None], alone["out"])
        torch.testing.assert_close(together["lse"][None, :, part], alone["lse"])
        at += length


@impls
@pytest.mark.parametrize("name", ["shared_local", "prefix, one empty head"])
def test_one_query_at_a_time_equals_all_at_once(name, impl):
    case = rows(queries=70, keys=70, pattern=PATTERNS[name])
    whole = run(case, impl=impl)["out"]
    for i in (0, 1, 33, 69):
        step = Case(
            case.query[:, :, i : i + 1], case.key, case.value, case.pattern, {"query_start": i}
        )
        torch.testing.assert_close(run(step, impl=impl)["out"], whole[:, :, i : i + 1])


@impls
@pytest.mark.parametrize("options", [{}, {"query_start": torch.empty(0, dtype=torch.int32)}])
def test_an_empty_batch_is_empty(impl, options):
    case = rows(queries=9, keys=9)
    tensors = [t[:0].requires_grad_() for t in (case.query, case.key, case.value)]
    out = spa.band_attention(*tensors, case.pattern, impl=impl, **options)
    out.sum().backward()
    assert out.shape == (0, HEADS, 9, 16)
    assert tensors[1].grad.shape == tensors[1].shape


@impls
def test_no_queries_give_no_rows(impl):
    case = rows(queries=0, keys=5)
    result = run(case, impl=impl)
    assert result["out"].shape == (2, HEADS, 0, 16)
    assert result["lse"].shape == (2, HEADS, 0)


@impls
def test_no_keys_and_no_tokens_have_gradients_of_zero(impl):
    check_case(rows(queries=3, keys=0, query_start=0, sinks=True), impl=impl)
    check_case(rows(queries=3, keys=0, query_start=0), impl=impl)
    check_case(documents([0, 0], [0, 0]), impl=impl)


@impls
def test_autocast_casts_as_sdpa_does(impl):
    """Autocast casts as scaled dot product attention does."""
    case = rows()
    inputs = [t.clone().requires_grad_() for t in (case.query, case.key, case.value)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = spa.band_attention(*inputs, case.pattern, return_lse=True, impl=impl)
        expected = torch.nn.functional.scaled_dot_product_attention(*inputs)
    # An operator's backward is its own even inside autocast; the reference's is PyTorch's.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=impl != "reference"):
        out.float().square().sum().backward()
    assert out.dtype == expected.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    half = [t.detach().to(torch.bfloat16).requires_grad_() for t in inputs]
    same = spa.band_attention(*half, case.pattern, impl=impl)
    same.float().square().sum().backward()
    assert torch.equal(out, same)
    assert all(torch.equal(a.grad, b.grad.float()) for a, b in zip(inputs, half))


def test_dispatch_follows_the_written_rule(monkeypatch):
    from spattention.impl import blockwise

    called = []
    attend = blockwise.attend
    monkeypatch.setattr(blockwise, "attend", lambda *a, **k: called.append(1) or attend(*a, **k))
    run(rows())
    assert called == [1]


@pytest.mark.parametrize("name", ["no sinks", "query_start per row", "documents in a row"])
def test_compiles_whole_and_gives_the_same(name):
    case = CASES[name]
    compiled = torch.compile(spa.band_attention, fullgraph=True, backend="aot_eager")
    tensors = [t.clone().requires_grad_() for t in (case.query, case.key, case.value)]
    out = compiled(*tensors, case.pattern, **case.options)
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    eager = [t.clone().requires_grad_() for t in (case.query, case.key, case.value)]
    expected = spa.band_attention(*eager, case.pattern, **case.options)
    assert torch.equal(out, expected)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, eager, torch.ones_like(out))):
        assert torch.equal(grad, wanted)


def test_compiled_varlen_and_a_new_length():
    compiled = torch.compile(spa.band_attention_varlen, fullgraph=True, backend="aot_eager")
    for lengths in ([20, 30], [25, 40], [7, 50]):
        case = documents(lengths, lengths)
        out = compiled(case.query, case.key, case.value, case.pattern, **case.options)
        torch.testing.assert_close(out, run(case)["out"])


@pytest.mark.parametrize("offsets", [[0, 5], [0, 50], [-4, 9], [2, 9], [0, 7, 3]])
def test_offsets_that_cannot_be_checked_are_clamped(offsets):
    """Where values are not read, bad ones stay in bounds, and tokens of no document give zeros."""
    length, pattern = 9, PATTERNS["shared_local"]
    query, key, value = (draw(length, HEADS, 16, seed=s) for s in range(3))
    cu = index(*offsets)
    outs = []
    for impl in IMPLEMENTATIONS:
        compiled = torch.compile(spa.band_attention_varlen, fullgraph=True, backend="aot_eager")
        outs.append(compiled(query, key, value, pattern, cu, cu, 9, 9, impl=impl))
    torch.testing.assert_close(*outs)
    inside = torch.arange(length)
    inside = (inside >= max(0, offsets[0])) & (inside < max(offsets))
    assert torch.equal(outs[0].abs().sum((1, 2)) > 0, inside)


@impls
def test_a_new_length_compiles(impl):
    compiled = torch.compile(spa.band_attention, fullgraph=True, backend="aot_eager")
    for length in (5, 9, 12):
        case = rows(length, length)
        out = compiled(case.query, case.key, case.value, case.pattern, impl=impl)
        torch.testing.assert_close(out, run(case, impl=impl)["out"])


def test_second_derivatives_raise():
    query = draw(1, HEADS, 5, 16).requires_grad_()
    key, value = draw(1, HEADS, 5, 16, seed=1), draw(1, HEADS, 5, 16, seed=2)
    out = spa.band_attention(query, key, value, PATTERNS["exclusive"])
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="`band_attention` has first derivatives"):
        torch.autograd.grad(grad.sum(), query)


def test_forward_mode_is_the_reference_alone():
    key, value, sinks = draw(1, HEADS, 5, 16, seed=1), draw(1, HEADS, 5, 16, seed=2), draw(HEADS)
    query = draw(1, HEADS, 5, 16)
    offsets = torch.tensor([0, 5], dtype=torch.int32)

    def padded(query, sinks, impl):
        return spa.band_attention(query, key, value, PATTERNS["exclusive"], sinks=sinks, impl=impl)

    def packed(query, sinks, impl):
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return spa.band_attention_varlen(
            *rows, PATTERNS["exclusive"], offsets, offsets, 5, 5, sinks=sinks, impl=impl
        )

    def cached(query, sinks, impl):
        store = spa.BandStore(PATTERNS["exclusive"], 1, HEADS, 16, dtype=key.dtype)
        return spa.band_attention_cached(
            query, store, PATTERNS["exclusive"], key, value, sinks=sinks
        )

    for attend in (padded, packed):
        exact = partial(attend, impl="reference")
        _, tangent = torch.func.jvp(exact, (query, sinks), (query, torch.zeros_like(sinks)))
        more, less = exact(query * (1 + 1e-3), sinks), exact(query * (1 - 1e-3), sinks)
        torch.testing.assert_close(tangent, (more - less) / 2e-3, rtol=1e-2, atol=1e-3)
    for attend in (padded, packed, cached):
        with pytest.raises(NotImplementedError, match="`query` has a tangent"):
            torch.func.jvp(partial(attend, sinks=sinks, impl=None), (query,), (query,))
        with pytest.raises(NotImplementedError, match="`sinks` has a tangent"):
            torch.func.jvp(partial(attend, query, impl=None), (sinks,), (sinks,))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sinks", [None, "learned"])
def test_merge_joins_disjoint_keys(packed, sinks):
    sinks = None if sinks is None else draw(HEADS)
    near = BandPattern((((0, 10),), ((0, 4),), (), ((5, 6),)), span=100)
    far = BandPattern((((10, 40),), ((4, 9), (20, 30)), ((50, 60),), ()), span=100)
    both = BandPattern((((0, 40),), ((0, 9), (20, 30)), ((50, 60),), ((5, 6),)), span=100)
    case = documents([60, 1, 9], [60, 1, 9]) if packed else rows(70, 70)
    parts = []
    for pattern in (near, far):
        result = run(Case(case.query, case.key, case.value, pattern, case.options))
        parts.append((result["out"], result["lse"]))
    out, lse = spa.merge(parts, sinks=sinks)
    options = {**case.options, "sinks": sinks}
    whole = Case(case.query, case.key, case.value, both, options)
    truth, rough = exact(whole), plain(whole)
    check_error("out", out, rough["out"], truth["out"])
    check_error("lse", lse, rough["lse"], truth["lse"])


def test_merge_in_half_precision_adds_in_float32():
    case = rows(dtype=torch.bfloat16)
    near = BandPattern((((0, 10),),) * HEADS, span=100)
    far = BandPattern((((10, 100),),) * HEADS, span=100)
    both = Case(case.query, case.key, case.value, BandPattern.dense(HEADS, 100))
    parts = [run(Case(case.query, case.key, case.value, p)) for p in (near, far)]
    out, lse = spa.merge([(part["out"], part["lse"]) for part in parts])
    truth, rough = exact(both), plain(both)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    check_error("out", out, rough["out"], truth["out"])
    check_error("lse", lse, rough["lse"], truth["lse"])


def test_merge_has_gradients_without_nan_in_empty_rows():
    out = torch.zeros(1, 1, 2, 4, requires_grad=True)
    lse = torch.tensor([[[-math.inf, 1.0]]], requires_grad=True)
    merged, total = spa.merge([(out, lse), (out, lse)])
    merged.sum().backward(retain_graph=True)
    total[0, 0, 1].backward()
    assert out.grad.isfinite().all()
    assert lse.grad.isfinite().all()
