"""Every error about what a user passes names the argument, the rule and the value."""

import math

import numpy
import pytest
import torch

import spattention as spa
from spattention import BandPattern

pattern = BandPattern.exclusive(4, 16)


def tensors(**shapes):
    base = {"query": (2, 4, 6, 8), "key": (2, 2, 6, 8), "value": (2, 2, 6, 8)}
    return {name: torch.zeros(shape) for name, shape in (base | shapes).items()}


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": BandPattern.dense(8, 16)}, "`pattern` has 8 heads but `query` has 4"),
        ({"pattern": "dense"}, "`pattern` must be a BandPattern, got str"),
        ({"query": torch.zeros(4, 6, 8)}, r"`query` must be \[B, H, length, D\], got shape \[4, 6, 8\]"),
        ({"key": torch.zeros(2, 3, 6, 8)}, "4 heads must be a multiple of key's heads, got 3"),
        ({"key": torch.zeros(2, 2, 6, 9)}, "`key` must have query's head_dim 8, got 9"),
        ({"key": torch.zeros(1, 2, 6, 8)}, "query's batch size 2, got 1 and 2"),
        ({"value": torch.zeros(2, 1, 6, 8)}, "`value` must have as many heads as `key`, 2, got 1"),
        ({"value": torch.zeros(2, 2, 5, 8)}, "`value` must have as many tokens as `key`, 6, got 5"),
        ({"key": torch.zeros(2, 2, 6, 8).half()}, "`key` must have query's dtype torch.float32, got torch.float16"),
        ({"value": torch.zeros(2, 2, 6, 8).double()}, "`value` must have query's dtype"),
        ({"query": torch.zeros(2, 4, 6, 8).long()}, "`query` must be floating point, got torch.int64"),
        ({"query": torch.zeros(2, 4, 7, 8)}, "must not have more tokens than `key`.*got 7 and 6"),
        ({"value": torch.zeros(2, 2, 6, 0)}, "head_dim must be at least 1, got 8 in `query` and 0"),
        ({"key": torch.zeros(2, 2, 6, 8, device="meta")}, "`key` must be on query's device cpu, got meta"),
        ({"sinks": torch.zeros(3)}, r"`sinks` must be \[H\] = \[4\], got \[3\]"),
        ({"sinks": torch.zeros(4, 1)}, r"`sinks` must be \[H\] = \[4\], got \[4, 1\]"),
        ({"sinks": torch.zeros(4).double()}, "`sinks` must have query's dtype torch.float32 or float32"),
        ({"query_start": -1}, "`query_start` must not be negative, got -1"),
        ({"query_start": 1.0}, "`query_start` must be an int or an int32 tensor, got 1.0"),
        ({"query_start": index(-2)[0]}, "`query_start` must not be negative, got -2"),
        ({"query_start": torch.tensor(1)}, "`query_start` must be int32, got torch.int64"),
        ({"query_start": index(0, 0, 0)}, r"`query_start` must be an int, \[\] or \[B\] = \[2\], got shape \[3\]"),
        ({"key_start": [0, 1]}, "`key_start` must be an int32 tensor, got list"),
        ({"key_start": torch.tensor([0, 1])}, "`key_start` must be int32, got torch.int64"),
        ({"key_start": index(0)}, r"`key_start` must be \[B\] = \[2\] or \[B, Q\] = \[2, 6\], got \[1\]"),
        (
            {"key_start": torch.stack([index(0, 0, 3, 3, 3, 3), index(0, 0, 3, 3, 2, 3)])},
            "`key_start` must never decrease along a row, got 3 then 2 in row 1",
        ),
        ({"query": [1]}, "`query` must be a tensor, got list"),
        ({"key": None}, "`key` must be a tensor, got NoneType"),
        ({"sinks": [0.0] * 4}, "`sinks` must be a tensor, got list"),
        ({"query_start": "1"}, "`query_start` must be an int or an int32 tensor, got '1'"),
        ({"query_start": True}, "`query_start` must be an int or an int32 tensor, got True"),
        ({"query_start": 2**31}, "`query_start` must be at most 2147483647, got 2147483648"),
        ({"query_start": 2**63}, "`query_start` must be at most 2147483647, got an integer of 65 bits"),
        ({"query_start": -(10**5000)}, "`query_start` must not be negative, got an integer of"),
        ({"query_start": numpy.zeros(2)}, "`query_start` must be an int or an int32 tensor, got array"),
        ({"query": numpy.zeros((2, 4, 6, 8))}, "`query` must be a tensor, got ndarray"),
        ({"value": torch.zeros(2, 2, 6, 8).to_sparse()}, "`value` must be a dense tensor, got layout torch.sparse_coo"),
        ({"query": torch.zeros(2, 4, 6, 8).to(torch.float8_e5m2)}, "`query` must be one of float16, bfloat16, float32, float64, got torch.float8_e5m2"),
        ({"key": torch.zeros(2, 2, 6, 8).cfloat()}, "`key` must be floating point, got torch.complex64"),
        ({"key_start": [0, 0]}, "`key_start` must be an int32 tensor, got list"),
        ({"key_start": torch.zeros(2, dtype=torch.int32, device="meta")}, "`key_start` must be on query's device cpu, got meta"),
        ({"sinks": torch.zeros(4, device="meta")}, "`sinks` must be on query's device cpu, got meta"),
        ({"sinks": numpy.zeros(4)}, "`sinks` must be a tensor, got ndarray"),
        ({"sinks": torch.zeros(4).long()}, "`sinks` must have query's dtype torch.float32 or float32, got torch.int64"),
        ({"pattern": None}, "`pattern` must be a BandPattern, got NoneType"),
        ({"scale": torch.tensor(1.0)}, "`scale` must be a float, got a tensor"),
        ({"scale": math.nan}, "`scale` must be finite, got nan"),
        ({"scale": -math.inf}, "`scale` must be finite, got -inf"),
        ({"scale": 10**400}, "`scale` must be finite, got an integer of 1330 bits"),
        ({"scale": True}, "`scale` must be a float, got bool"),
        ({"scale": "1"}, "`scale` must be a float, got str"),
        ({"scale": 1j}, "`scale` must be a float, got complex"),
        ({"scale": [1.0]}, "`scale` must be a float, got list"),
        ({"scale": numpy.ones(1)}, "`scale` must be a float, got ndarray"),
        ({"impl": 3}, "`impl` must be None or one of .*got 3"),
        ({"impl": "cuda"}, r"`impl` must be None or one of .*got 'cuda'"),
    ],
)  # fmt: skip
def test_band_attention(change, message):
    arguments = {**tensors(), "pattern": pattern, **change}
    with pytest.raises(ValueError, match=message):
        spa.band_attention(**arguments)


def packed(**change):
    cu = index(0, 2, 6)
    arguments = {
        "query": torch.zeros(6, 4, 8),
        "key": torch.zeros(6, 2, 8),
        "value": torch.zeros(6, 2, 8),
        "pattern": pattern,
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    }
    return arguments | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 6, 4, 8)}, r"`query` must be \[T, H, D\], got shape"),
        ({"value": torch.zeros(5, 2, 8)}, "`value` must have as many tokens as `key`, 6, got 5"),
        ({"cu_seqlens_q": index(1, 2, 6)}, "`cu_seqlens_q` must start at 0, got 1"),
        ({"cu_seqlens_k": index(0, 7, 6)}, "`cu_seqlens_k` must never decrease, got 7 then 6"),
        ({"cu_seqlens_q": index(0, 2, 5)}, "`cu_seqlens_q` must end at the number of tokens, 6, got 5"),
        ({"cu_seqlens_k": index(0, 6)}, "must name the same documents, got 2 and 1"),
        ({"cu_seqlens_q": index(0)}, r"`cu_seqlens_q` must be \[documents \+ 1\].*got shape \[1\]"),
        ({"cu_seqlens_q": index(0, 2, 6).long()}, "`cu_seqlens_q` must be int32, got torch.int64"),
        ({"cu_seqlens_q": index(0, 3, 6)}, "more queries than keys, got 3 and 2 in document 0"),
        ({"max_seqlen_q": 3}, "`max_seqlen_q` must be at least the longest document, 4, got 3"),
        ({"max_seqlen_k": -1}, "`max_seqlen_k` must not be negative, got -1"),
        ({"max_seqlen_k": torch.tensor(4)}, "`max_seqlen_k` must be an int, got Tensor"),
        ({"max_seqlen_k": 2**31}, f"`max_seqlen_k` must be at most {2**31 - 1}, got {2**31}"),
        ({"max_seqlen_q": 10**5000}, f"`max_seqlen_q` must be at most {2**31 - 1}, got an int"),
        ({"max_seqlen_k": True}, "`max_seqlen_k` must be an int, got bool"),
        ({"max_seqlen_k": 4.0}, "`max_seqlen_k` must be an int, got float"),
        ({"cu_seqlens_q": [0, 2, 6]}, "`cu_seqlens_q` must be an int32 tensor, got list"),
        ({"cu_seqlens_k": None}, "`cu_seqlens_k` must be an int32 tensor, got NoneType"),
        ({"cu_seqlens_k": index(0, 2, 6).to("meta")}, "`cu_seqlens_k` must be on query's device cpu, got meta"),
        ({"scale": math.nan}, "`scale` must be finite, got nan"),
        ({"sinks": torch.zeros(5)}, r"`sinks` must be \[H\] = \[4\], got \[5\]"),
        ({"pattern": {}}, "`pattern` must be a BandPattern, got dict"),
        ({"query": None}, "`query` must be a tensor, got NoneType"),
        ({"max_seqlen_q": None}, "`max_seqlen_q` must be an int, got NoneType"),
    ],
)  # fmt: skip
def test_band_attention_varlen(change, message):
    with pytest.raises(ValueError, match=message):
        spa.band_attention_varlen(**packed(**change))


def test_validate_reads_what_the_operators_read():
    spa.validate(**tensors(), pattern=pattern, key_start=index(0, 9))
    spa.validate(**packed())
    falling = index(5, 4, 3, 2, 1, 0).expand(2, 6)
    with pytest.raises(ValueError, match="must never decrease along a row"):
        spa.validate(**tensors(), pattern=pattern, key_start=falling)
    with pytest.raises(ValueError, match="`cu_seqlens_q` must start at 0"):
        spa.validate(**packed(cu_seqlens_q=index(1, 2, 6)))
    with pytest.raises(ValueError, match="must be given with `cu_seqlens_q`, got None"):
        spa.validate(**packed(max_seqlen_k=None))
    with pytest.raises(ValueError, match="`scale` must be finite, got nan"):
        spa.validate(**tensors(), pattern=pattern, scale=math.nan)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_validate_names_sinks_without_a_number(value):
    """The operator passes NaN on, as it does that of a query, and does not wait to look for it."""
    sinks = torch.tensor([value, -math.inf, 0.0, 1.0])
    spa.validate(**tensors(), pattern=pattern, sinks=sinks[[1, 1, 2, 3]])
    for given in ({**tensors(), "pattern": pattern}, packed()):
        with pytest.raises(ValueError, match=f"`sinks` must be below inf, got {value} in head 0"):
            spa.validate(**given, sinks=sinks)
    out = spa.band_attention(**tensors(), pattern=pattern, sinks=sinks)
    assert out[:, 1:].isfinite().all()
    if math.isnan(value):
        assert out[:, 0].isnan().all()


@pytest.mark.parametrize("name", ["cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"])
def test_validate_ignores_no_argument(name):
    """One of packed documents alone, or one of rows beside them."""
    with pytest.raises(ValueError, match=f"`cu_seqlens_q` must be given with `{name}`, got None"):
        spa.validate(**tensors(), pattern=pattern, **{name: packed()[name]})
    for other in ({"query_start": 3}, {"key_start": index(0)}):
        with pytest.raises(ValueError, match="must not be given with `cu_seqlens_q`, got"):
            spa.validate(**packed(**other))


OUT, LSE = torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6)


@pytest.mark.parametrize(
    ("parts", "sinks", "message"),
    [
        (None, None, "`parts` must be pairs of tensors .*got NoneType"),
        (OUT, None, "`parts` must be pairs of tensors .*got Tensor"),
        ([(OUT, LSE.numpy())], None, r"`parts` must be pairs of tensors .*got \(Tensor, ndarray\)"),
        ([(OUT, LSE.int())], None, "`parts` must be floating point, got out torch.float32 with lse torch.int32"),
        ([(OUT.long(), LSE)], None, "`parts` must be floating point, got out torch.int64"),
        ([(torch.zeros(3, 3), torch.zeros(3, 3))], None, r"`parts` must hold out \[B, H, Q, D\] or \[T, H, D\], got shape \[3, 3\]"),
        ([(torch.zeros(3), torch.zeros(3))], None, r"got shape \[3\]"),
        ([(OUT, LSE), (OUT.half(), LSE)], None, "`parts` must share one dtype.*got out torch.float16"),
        ([(OUT, LSE), (OUT, LSE.double())], None, "`parts` must share one dtype.*with lse torch.float64"),
        ([(OUT, LSE), (OUT.to("meta"), LSE)], None, "`parts` must be on one device, cpu, got out on meta"),
        ([(OUT, LSE)], [0.0] * 4, "`sinks` must be a tensor, got list"),
        ([(OUT, LSE)], torch.zeros(4).int(), "`sinks` must be floating point, got torch.int32"),
        ([(OUT, LSE)], torch.zeros(4, device="meta"), "`sinks` must be on the parts' device cpu, got meta"),
    ],
)  # fmt: skip
def test_merge(parts, sinks, message):
    with pytest.raises(ValueError, match=message):
        spa.merge(parts, sinks=sinks)


def test_merge_wants_parts_of_one_shape():
    out, lse = torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match="`parts` must hold at least one"):
        spa.merge([])
    with pytest.raises(ValueError, match="`parts` must share one shape"):
        spa.merge([(out, lse), (out[:1], lse[:1])])
    for parts, got in (
        ([out], "Tensor"),
        ([(out, None)], r"\(Tensor, NoneType\)"),
        ([()], r"\(\)"),
    ):
        with pytest.raises(ValueError, match=rf"`parts` must be pairs .*got {got}"):
            spa.merge(parts)
    assert torch.equal(spa.merge(iter([(out, lse)]))[0], out)
    for sinks in (3, 2, 1):
        with pytest.raises(ValueError, match=r"`sinks` must be \[H\] = \[4\], got"):
            spa.merge([(out, lse)], sinks=torch.zeros(sinks))
    with pytest.raises(ValueError, match=r"`sinks` must be \[H\] = \[4\], got"):
        spa.merge([(out[:1], lse[:1])], sinks=torch.zeros(1))
