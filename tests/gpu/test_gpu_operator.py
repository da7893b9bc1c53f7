"""The registered operator: what PyTorch asks of it, determinism, hostile values, sizes beyond 32
bits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import spattention as spa
from spattention.impl.triton import op
from spattention.testing import check_error, exact, plain, run

from .cases import VARIANTS, Variant, draw
from .plans import changed_plans

SELF = VARIANTS[0]
ONE_OF_EACH_MODE = tuple({variant.mode: variant for variant in VARIANTS}.values())
ALL_NAMES = ("query", "key", "value")


def _arguments(variant: Variant, seed: int = 3) -> tuple:
    case = draw(variant, seed)
    start = case.key.shape[2] - case.query.shape[2] if not case.packed else 0
    starts = case.options.get("query_start")
    tensors = [
        t.transpose(0, 1)[None] if case.packed else t for t in (case.query, case.key, case.value)
    ]
    tensors = [t.detach().requires_grad_() for t in tensors]
    return (
        *tensors,
        list(case.pattern.flat),
        case.pattern.prefix,
        0.1,
        0 if starts is not None else start,
        True,
        starts,
        case.options.get("key_start"),
        case.options.get("sinks"),
        case.options.get("cu_seqlens_q"),
        case.options.get("cu_seqlens_k"),
    )


@pytest.mark.parametrize("variant", ONE_OF_EACH_MODE, ids=str)
def test_opcheck(variant: Variant) -> None:
    torch.library.opcheck(op.forward, _arguments(variant))


@pytest.mark.parametrize("variant", VARIANTS[:8], ids=str)
def test_same_bits_on_every_run(variant: Variant) -> None:
    case = draw(variant, 11, longest=2000)
    rows = case.query.shape[:2][::-1] if case.packed else case.query.shape[:3]
    grads = (torch.randn_like(case.query), torch.randn(rows, device="cuda"))
    first = run(case, grads, impl="triton")
    for _ in range(5):
        again = run(case, grads, impl="triton")
        for name in first:
            assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("widths", ["uniform", "geometric"])
def test_five_products_give_what_seven_give(
    widths: str, head_dim: int, deterministic: bool
) -> None:
    """Where many blocks of keys add to the same queries at the same time; in turn, they give the
    same bits on every run.
    """
    pattern = spa.BandPattern.shared_local(16, 8192, widths=widths)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    *inputs, d_out = (torch.randn(1, 16, 8192, head_dim, **like) for _ in range(4))
    leaves = [each.requires_grad_() for each in inputs]

    def gradients(fused: bool) -> tuple[torch.Tensor, ...]:
        with changed_plans(fused_backward=fused):
            out = spa.band_attention(*leaves, pattern, impl="triton", deterministic=deterministic)
            return torch.autograd.grad(out, leaves, d_out)

    expected, first = gradients(False), gradients(True)
    for _ in range(20 if deterministic else 5):
        for found, wanted, before in zip(gradients(True), expected, first):
            limit = 0.01 * wanted.abs().max().item()
            torch.testing.assert_close(found, wanted, rtol=0, atol=limit)
            assert not deterministic or torch.equal(found, before)


def test_full_graph_compile() -> None:
    pattern = spa.BandPattern.shared_local(4, 256)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return spa.band_attention(q * 1, k, v, pattern, impl="triton") + 1

    inputs = [
        torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    compiled = torch.compile(attend, fullgraph=True)
    out, expected = compiled(*inputs), attend(*inputs)
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, seed), torch.autograd.grad(expected, inputs, seed)
    ):
        torch.testing.assert_close(found, wanted)


def test_cuda_graph_replays_new_values() -> None:
    pattern = spa.BandPattern.exclusive(4, 300)
    q, k, v = (
        torch.randn(1, 4, 300, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def step() -> tuple[torch.Tensor, ...]:
        out = spa.band_attention(q, k, v, pattern, impl="triton")
        return (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step()
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for found, wanted in zip(captured, step()):
        assert torch.equal(found, wanted)


def test_first_call_inside_a_capture_raises() -> None:
    pattern = spa.BandPattern.exclusive(5, 77)
    q = torch.randn(1, 5, 77, 64, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="before the capture of a CUDA graph"),
        torch.cuda.graph(graph),
    ):
        spa.band_attention(q, q, q, pattern, impl="triton")


def test_autocast_and_checkpointing() -> None:
    pattern = spa.BandPattern.shared_local(4, 200)
    inputs = [torch.randn(1, 4, 200, 64, device="cuda", requires_grad=True) for _ in range(3)]

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return spa.band_attention(*tensors, pattern, impl="triton")

    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = attend(*inputs)
        kept = checkpoint(attend, *inputs, use_reentrant=False)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, kept)
    seed = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(kept, inputs, seed), torch.autograd.grad(out, inputs, seed)
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


def test_chosen_for_cuda_tensors_and_refused_elsewhere() -> None:
    pattern = spa.BandPattern.exclusive(2, 64)
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(
        spa.band_attention(q, q, q, pattern), spa.band_attention(q, q, q, pattern, impl="triton")
    )
    with pytest.raises(ValueError, match="got cpu"):
        spa.band_attention(*(q.cpu(),) * 3, pattern, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        spa.band_attention(*(q.double(),) * 3, pattern, impl="triton")
    with pytest.raises(ValueError, match="head_dim"):
        spa.band_attention(q, q, q[..., :32], pattern, impl="triton")


def test_double_backward_raises() -> None:
    pattern = spa.BandPattern.exclusive(2, 64)
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = spa.band_attention(q, q, q, pattern, impl="triton")
    (grad,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_saves_inputs_output_and_lse_alone() -> None:
    pattern = spa.BandPattern.shared_local(4, 512)
    q, k, v = (
        torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spa.band_attention(q, k, v, pattern, impl="triton")
    assert sum(t.numel() for t in saved) == 4 * q.numel() + q.shape[1] * q.shape[2]


HOSTILE = (
    [-5, 3, 900, 20, 64],
    [0, 64, 10, 64, 64],
    [0, 2_000_000_000, -2_000_000_000, 5, 2_147_483_647],
    [64, 64, 0, 0, 0],
    [0, 10, 20, 30, 40],
)


@pytest.mark.parametrize("offsets", HOSTILE)
def test_hostile_offsets_stay_in_bounds(offsets: list[int]) -> None:
    """Guard rows around every tensor must survive; what lies behind the last offset must be
    zero.
    """
    pattern = spa.BandPattern.shared_local(4, 64)
    guarded = [torch.randn(64 + 512, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    inputs = [t[256:320].detach().requires_grad_() for t in guarded]
    cu = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    out = spa.band_attention_varlen(
        *inputs, pattern, cu, cu.flip(0) if offsets[0] else cu, 64, 64, impl="triton"
    )
    torch.autograd.grad(out, inputs, torch.randn_like(out))
    torch.cuda.synchronize()
    if offsets == HOSTILE[-1]:
        assert (out[40:] == 0).all()


@pytest.mark.parametrize("value", [-(2**31), -7, 2**31 - 1])
def test_hostile_starts_stay_in_bounds(value: int) -> None:
    pattern = spa.BandPattern.shared_local(4, 64)
    inputs = [
        torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    falling = torch.randint(-9, 99, (2, 64), device="cuda", dtype=torch.int32)
    falling[:, ::3] = value
    for options in (
        {"key_start": falling},
        {"key_start": falling[:, 0].contiguous()},
        {"query_start": falling[:, 0].contiguous()},
    ):
        out = spa.band_attention(*inputs, pattern, impl="triton", **options)
        torch.autograd.grad(out, inputs, torch.randn_like(out))
    torch.cuda.synchronize()


@pytest.mark.parametrize(("batch", "heads"), [(70_000, 1), (1, 70_000)])
def test_many_rows_of_the_batch_and_heads(batch: int, heads: int) -> None:
    pattern = spa.BandPattern.sliding_window(heads, 20, 5)
    q, k, v = (
        torch.randn(batch, heads, 20, 16, device="cuda", dtype=torch.float16) for _ in range(3)
    )
    out = spa.band_attention(q, k, v, pattern, impl="triton")
    few = spa.BandPattern.sliding_window(1, 20, 5)
    for b, h in ((0, 0), (batch - 1, heads - 1)):
        case = [t[b : b + 1, h : h + 1] for t in (q, k, v)]
        alone = spa.band_attention(*case, few, impl="triton")
        assert torch.equal(out[b : b + 1, h : h + 1], alone)


@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_million_tokens(tokens_first: bool) -> None:
    """2^31 elements and more: the last queries of the last head against float64 on the keys that
    they see.
    """
    heads, length, tail, dim = 17, 1_000_003, 100, 128
    pattern = spa.BandPattern.sliding_window(heads, length, 150)
    shape = (1, length, heads, dim) if tokens_first else (1, heads, length, dim)
    tensors = [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(4)]
    q, k, v, d_out = (t.transpose(1, 2) if tokens_first else t for t in tensors)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    out = spa.band_attention(q, k, v, pattern, impl="triton")
    d_query, d_key, d_value = torch.autograd.grad(out, (q, k, v), d_out)
    near = slice(length - tail - 150, length)
    small = [t[:, -1:, near].detach() for t in (q, k, v)]
    from spattention.testing import Case

    case = Case(*small, spa.BandPattern.sliding_window(1, length, 150))
    grads = (d_out[:, -1:, near], torch.zeros(1, 1, tail + 150, device="cuda"))
    truth, rough = exact(case, grads), plain(case, grads)
    found = {"out": out, "d_query": d_query, "d_key": d_key, "d_value": d_value}
    for name, tensor in found.items():
        last = slice(-tail, None)
        pair = (d[name][:, :, last] for d in (rough, truth))
        check_error(name, tensor[:, -1:, last].detach(), *pair)


def test_first_call_of_a_new_thread() -> None:
    """A thread without a CUDA context once could not encode the copy engine's descriptors."""
    pattern = spa.BandPattern.exclusive(2, 64)
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    expected = spa.band_attention(q, q, q, pattern, impl="triton")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(spa.band_attention, q, q, q, pattern, impl="triton").result()
    assert torch.equal(found, expected)
