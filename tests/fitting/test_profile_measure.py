"""Profiles against attention that is known in closed form, and against full softmaxes."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MistralConfig, Qwen3Config
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import spattention as spa

sys.path.insert(0, str(Path(__file__).parent))
from attending import STRENGTHS, cosine_model, cosine_weights, profile_of, tokens

from spattention.data.tokenizer import for_transformers, train_tokenizer

measure = import_module("spattention.hf.profile")
DIGITS = {"rtol": 1e-5, "atol": 1e-12}  # six digits are kept
SMALL = {
    "vocab_size": 31,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
}


def profile(model, batches, **options):
    return spa.hf.profile(model, batches, **{"progress": False, "prefix_max": 4} | options)


@pytest.mark.parametrize("length", [1, 3, 37, 64, 133])
def test_shares_are_those_of_known_attention(length):
    found = profile(cosine_model(), [tokens(2, length)])
    expected = profile_of(cosine_weights(STRENGTHS, length))
    assert found.edges == expected.edges
    for name in ("first", "distance", "first_distance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **DIGITS)
    assert (found.rows, found.tokens, found.length) == (2, 2 * length, length)
    assert found.model.kv_heads == 2
    assert (found.model.layers, found.model.heads, found.model.vocabulary) == (2, 4, 31)


def test_rows_of_all_lengths_count_by_their_queries():
    """A mean over queries, so that a row of 70 tokens counts ten times as much as one of 7."""
    found = profile(cosine_model(), [tokens(1, 70), tokens(1, 7)[0]])
    long, short = (profile_of(cosine_weights(STRENGTHS, n)) for n in (70, 7))
    torch.testing.assert_close(found.first, (70 * long.first + 7 * short.first) / 77, **DIGITS)
    near = (70 * long.distance[..., :7] + 7 * short.distance) / 77
    torch.testing.assert_close(found.distance[..., :7], near, **DIGITS)


class Watched:
    """Queries and keys of each layer of a model with SDPA."""

    def __init__(self, monkeypatch):
        self.calls = []
        own = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attend(module, query, key, *rest, **more):
            self.calls.append((query.double(), key.double(), more["scaling"]))
            return own(module, query, key, *rest, **more)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", attend)

    def weights(self):
        rows = []
        for query, key, scale in self.calls:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = query @ key.mT * scale
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            rows.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        return torch.stack(rows)


@pytest.mark.parametrize(("length", "block"), [(65, 2**24), (130, 2000), (97, 1)])
def test_shares_are_those_of_a_full_softmax(length, block, monkeypatch):
    """In float64, through several layers, whatever the number of queries in a block."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, head_dim=8)).double().eval()
    watched = Watched(monkeypatch)
    ids = tokens(1, length)
    with torch.no_grad():
        model(ids, use_cache=False)
    monkeypatch.setattr(measure, "BLOCK", block)
    found, expected = profile(model, [ids]), profile_of(watched.weights()[:, 0])
    for name in ("first", "distance", "first_distance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **DIGITS)
    total = found.first.sum(-1) + found.distance.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-4, rtol=0)
    query, key, scale = watched.calls[0]
    scores = (query @ key.repeat_interleave(2, dim=1).mT * scale)[0]
    means = torch.stack([scores[:, j:, j].mean(dim=1) for j in range(4)], dim=1)
    torch.testing.assert_close(found.first_logits[0], means, **DIGITS)


def test_masked_tokens_are_left_out():
    """Left padding, right padding and holes: a masked token has no position and no query."""
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, head_dim=8)).eval()
    ids = tokens(1, 20)[0]
    padded = torch.stack(
        [
            torch.cat([torch.zeros(5, dtype=torch.long), ids]),
            torch.cat([ids, torch.zeros(5, dtype=torch.long)]),
            torch.cat([ids[:9], torch.zeros(5, dtype=torch.long), ids[9:]]),
        ]
    )
    mask = torch.ones_like(padded)
    mask[0, :5] = mask[1, 20:] = mask[2, 9:14] = 0
    plain = profile(model, [torch.stack([ids] * 3)])
    assert profile(model, [{"input_ids": padded, "attention_mask": mask}]) == plain
    assert plain.tokens == 60


def test_learned_sinks_of_a_model_take_their_share():
    config = GptOssConfig(
        **SMALL | {"intermediate_size": 16}, head_dim=8, num_local_experts=2,
        num_experts_per_tok=1, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(100.0)
    found = profile(model, [tokens(1, 30)])
    assert float((found.first.sum(-1) + found.distance.sum(-1)).max()) < 1e-4


def test_needles_count_for_predicting_queries():
    """Even attention gives a needle of 3 tokens 3 / (i + 1) of the query at position i."""
    model = cosine_model(((0.0, 0.0),))
    row = tokens(1, 40)[0]
    found = profile(model, [row], needles=[(row, (10, 13), (37, 40)), (row, (2, 5), (20, 22))])
    expected = (
        sum(3 / (i + 1) for i in (36, 37, 38)) / 3 + sum(3 / (i + 1) for i in (19, 20)) / 2
    ) / 2
    assert found.needles == 2
    assert found.needle.tolist() == [[pytest.approx(expected, rel=1e-5)] * 2]


def test_planted_passkeys_lie_where_heads_are_watched():
    book = "It was the best of times, it was the worst of times. " * 40
    tokenizer = for_transformers(train_tokenizer([book + "0123456789"], 300), 512, None)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL | {"vocab_size": 320}, head_dim=8))
    row = torch.tensor(tokenizer(book)["input_ids"])[:250]
    planted = import_module("spattention.hf.needles").plant([row], 3, tokenizer)
    for needle in planted:
        text = tokenizer.decode(needle.tokens)
        key = tokenizer.decode(needle.answer_tokens)
        assert key.isdigit()
        assert f"The pass key is {key}. Remember it." in text
        assert text.endswith(f"The pass key is {key}")
        assert torch.equal(needle.tokens[needle.needle.start : needle.needle.stop],
                           needle.answer_tokens)  # fmt: skip
        sentence = needle.tokens[needle.sentence.start : needle.sentence.stop]
        assert tokenizer.decode(sentence) == f"\nThe pass key is {key}. Remember it.\n"
        assert len(needle.tokens) == len(row)
    assert planted[0].needle.start < planted[1].needle.start < planted[2].needle.start
    found = profile(model, [row], needles=3, tokenizer=tokenizer)
    assert found.needles == 3
    assert found.tokens == 250  # the needles' rows do not count
    assert bool(((found.needle > 0) & (found.needle < 1)).all())
    given = profile(model, [row], needles=planted, sensitivity=1)
    assert torch.equal(given.needle, found.needle)
    bare = [(each.tokens, (each.needle.start, each.needle.stop),
             (each.answer.start, each.answer.stop)) for each in planted]  # fmt: skip
    other = profile(model, [row], needles=bare, sensitivity=1)
    assert not torch.equal(given.needle_sensitivity, other.needle_sensitivity), "of the sentence"


def test_a_model_that_copies_finds_its_needles():
    """The answer is what the model would say, so a model that always says 7 finds sevens."""
    model = cosine_model()
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[7] = 1.0
    model.model.norm.weight.data.fill_(1.0)
    row = tokens(1, 30)[0]
    with torch.no_grad():
        says = model(row[None]).logits[0].argmax(-1)
    hit, miss = row.clone(), row.clone()
    hit[25:27] = says[24:26]
    with torch.no_grad():
        hit[26] = model(hit[None]).logits[0, 25].argmax()
        miss[25] = (model(miss[None]).logits[0, 24].argmax() + 1) % 31
    found = profile(model, [row], needles=[(hit, (3, 5), (25, 27)), (miss, (3, 5), (25, 27))])
    assert found.needles_found == 1


class Interrupted(list):
    """Batches after which the user presses Ctrl-C."""

    def __iter__(self):
        yield from super().__iter__()
        raise KeyboardInterrupt


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("batches", "raised"),
    [
        ([tokens(1, 9)], None),
        ([tokens(1, 9), torch.tensor([[99]])], ValueError),
        (Interrupted([tokens(1, 9)]), KeyboardInterrupt),
    ],
)
def test_the_model_is_as_before_whatever_happens(implementation, batches, raised):
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(**SMALL, head_dim=8), attn_implementation=implementation
    )
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    known = set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)
    if raised is None:
        profile(model, batches)
    else:
        with pytest.raises(raised):
            profile(model, batches)
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == implementation
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == known
    assert all(p.grad is None for p in model.parameters())


def test_a_profiled_model_trains_and_takes_bands():
    """The model profiled can still be trained and given bands."""
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, head_dim=8))
    ids = tokens(1, 12)
    expected = model.eval()(ids).logits
    found = profile(model, [ids])
    assert torch.equal(model(ids).logits, expected)
    spa.hf.apply(model, spa.fit(found, pairs=0.5))
    model(ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match=r'`model` must be dense, .*got one with "spattention"'):
        profile(model, [ids])


def test_windows_longer_than_the_rows_are_dense():
    config = MistralConfig(**SMALL, sliding_window=16)
    model = AutoModelForCausalLM.from_config(config)
    assert profile(model, [tokens(1, 16)]).length == 16
    with pytest.raises(ValueError, match="sliding window of 16 tokens in layer 0 and rows of 17"):
        profile(model, [tokens(1, 17)])


def test_lines_where_there_is_no_terminal(capsys):
    spa.hf.profile(cosine_model(), [tokens(1, 5)] * 20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "profiling: 2 of 20"
    assert lines[-1] == "profiling: 20 of 20"
    assert len(lines) == 10
    profile(cosine_model(), [tokens(1, 5)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "`batches` must hold at least one row of tokens, got none"),
        ("text", {}, "`batches` must be an iterable of token ids, got str"),
        (5, {}, "`batches` must be an iterable of token ids, got int"),
        ({"input_ids": [1]}, {}, "`batches` must be an iterable of token ids, got dict"),
        (["text"], {}, r"batch 0 of `batches` must be token ids \[N\] or \[B, N\], got str"),
        ([torch.rand(3)], {}, "batch 0 of `batches` must be integer token ids, got torch.float32"),
        ([torch.zeros(1, 1, 1, dtype=int)], {}, r"must be token ids .*got \[1, 1, 1\]"),
        ([[1, 2], [1, 31]], {}, "batch 1 .* must hold tokens from 0 to 30, .* got 1 to 31"),
        ([[-1]], {}, "must hold tokens from 0 to 30, the model's, got -1 to -1"),
        ([[0] * 513], {}, "must hold at most 512 tokens per row, got 513"),
        ([{"labels": [1]}], {}, r"batch 0 .* must have `input_ids`, got \['labels'\]"),
        ([{"input_ids": [1], "position_ids": [0]}], {}, "must not have `position_ids`"),
        (
            [{"input_ids": [1, 2], "attention_mask": [1]}],
            {},
            r"`attention_mask` of batch 0 .* shape \[1, 2\] of its tokens, got \[1, 1\]",
        ),
        ([{"input_ids": [1], "attention_mask": [0]}], {}, "at least one token per row"),
        ([[1, 2]], {"prefix_max": 0}, "`prefix_max` must be an integer of at least 1, got 0"),
        ([[1, 2]], {"prefix_max": True}, "`prefix_max` must be .*got True"),
        ([[1, 2]], {"needles": 2}, "`tokenizer` must be given to plant 2 needles, got None"),
        ([[1, 2]], {"needles": 0}, "`needles` must be at least 1, or None, got 0"),
        ([[1, 2]], {"needles": 1.5}, "`needles` must be a number, or triples .*got 1.5"),
        ([[1, 2]], {"needles": [3]}, r"needle 0 of `needles` must be \(tokens, .*got int"),
        (
            [[1, 2]],
            {"needles": [([1, 2, 3], (1, 3), (2, 3))]},
            r"0 <= needle < answer within its 3 tokens, got \(1, 3\) and \(2, 3\)",
        ),
        (
            [[1, 2]],
            {"needles": [([1, 2, 99], (0, 1), (2, 3))]},
            "needle 0 of `needles` must hold tokens from 0 to 30",
        ),
    ],
)
def test_wrong_arguments_are_named(batches, options, message):
    with pytest.raises(ValueError, match=message):
        profile(cosine_model(), batches, **options)


def test_rows_too_short_for_needles_are_named():
    tokenizer = for_transformers(train_tokenizer(["0123456789 text"], 260), 512, None)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL | {"vocab_size": 320}, head_dim=8))
    with pytest.raises(ValueError, match=r"rows of at least .* tokens to plant needles in, got 40"):
        profile(model, [tokens(1, 40)], needles=1, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "`model` must be a Transformers model, got Linear"),
        (
            lambda: spa.hf.apply(cosine_model(), spa.BandPattern.dense(4, 8)),
            '`model` must be dense, with its own attention, got one with "spattention"',
        ),
        (
            lambda: AutoModelForCausalLM.from_config(
                Qwen3Config(**SMALL, head_dim=8, is_causal=False)
            ),
            "`model` must be causal",
        ),
    ],
)
def test_models_that_are_not_dense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        profile(make(), [[1, 2]])


class Explicit:
    """Attention by whole matrices of scores, whose gradients are kept."""

    def __init__(self, monkeypatch):
        self.scores = {}
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", self)

    def __call__(self, module, query, key, value, mask, scaling=None, **more):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        scores = query @ key.mT * scaling
        self.scores[module.layer_idx] = scores
        scores.retain_grad()
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


def model_with_outputs():
    """`cosine_model` whose attention changes what the model computes."""
    model = cosine_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.normal_()
            layer.self_attn.o_proj.weight.normal_()
    return model


@pytest.mark.parametrize("length", [3, 70, 150])
def test_sensitivity_is_the_squared_gradient_by_bin(length, monkeypatch):
    """Against autograd through whole matrices of scores; no parameter gets a gradient."""
    torch.manual_seed(1)
    model = model_with_outputs()
    rows = tokens(2, length)
    found = profile(model, rows, sensitivity=2)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert found.sensitivity_rows == 2
    explicit = Explicit(monkeypatch)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    late = torch.arange(length) >= 4
    wanted = torch.zeros_like(found.sensitivity)
    for row in rows:
        loss = model(input_ids=row[None], labels=row[None], use_cache=False).loss
        (loss * (length - 1)).backward()
        for layer, scores in explicit.scores.items():
            for k, (near, far) in enumerate(zip(found.edges, found.edges[1:])):
                inside = (distance >= near) & (distance < far) & late
                term = (scores.grad[0] * inside).sum(-1)
                wanted[layer, :, k] += term.square().sum(-1) / (2 * length)
    torch.testing.assert_close(found.sensitivity, wanted, rtol=1e-4, atol=1e-10)
    assert length == 3 or float(wanted.max()) > 1e-6


@pytest.mark.parametrize("length", [20, 150])
def test_answers_mind_needles_by_squared_gradient(length, monkeypatch):
    """Against autograd through whole matrices of scores, of the loss of the answer alone."""
    torch.manual_seed(2)
    model = model_with_outputs()
    rows = tokens(2, length)
    places = [((2, 5), (length - 3, length)), ((7, 9), (12, 14))]
    triples = [(row, *place) for row, place in zip(rows, places, strict=True)]
    found = profile(model, rows, needles=triples, sensitivity=1).needle_sensitivity
    explicit = Explicit(monkeypatch)
    wanted = torch.zeros_like(found)
    for row, (start, stop), (first, last) in triples:
        logits = model(input_ids=row[None], use_cache=False).logits[0, first - 1 : last - 1]
        torch.nn.functional.cross_entropy(logits, row[first:last], reduction="sum").backward()
        grads = torch.stack([explicit.scores[k].grad[0] for k in sorted(explicit.scores)])
        each = grads[:, :, stop:, start:stop].double().sum(-1).square().sum(-1)
        wanted += each / each.sum() / len(triples)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)
    assert float(found.sum()) == pytest.approx(1, abs=1e-4)
    assert profile(model, rows, needles=triples).needle_sensitivity is None


def test_gradients_need_rows_and_leave_the_model_alone():
    model = cosine_model()
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`sensitivity` must be at most the 2 rows .* got 3"):
        profile(model, tokens(2, 9), sensitivity=3)
    for wrong in (-1, True, 1.0):
        with pytest.raises(ValueError, match=f"`sensitivity` must be an integer .* got {wrong}"):
            profile(model, tokens(2, 9), sensitivity=wrong)
    profile(model, tokens(2, 9), sensitivity=1)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["lm_head.weight"]
