"""Models with sliding windows of their own, and models that see."""

from __future__ import annotations

import copy
import importlib
import inspect

import pytest
import torch
import transformers
from tiny import (
    COMMON,
    EXACT,
    FIRST,
    GROUPED,
    SECOND,
    STOCK,
    Masked,
    build,
    logits,
    tokens,
)
from window_reader import what_else

import spattention as spa
from spattention.hf.windows import WINDOW_IS_ONLY_A_MASK

close = torch.testing.assert_close
WINDOW = 4
MIXED = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention", "sliding_attention"],
    "max_window_layers": 1,
}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("own", STOCK)
def test_sliding_layers_are_kept(own):
    stock = Masked(build("qwen3", own, **MIXED), (FIRST, None))
    model = spa.hf.apply(build("qwen3", own, **MIXED), FIRST)
    ids = tokens(2, 17)
    close(logits(model, ids), stock(ids).logits, **STOCK[own])
    assert [a.spattention.pattern for a in _attention(model)] == [FIRST, None]
    assert model.config.layer_types == MIXED["layer_types"]


def test_sliding_layers_keep_padding_and_caches():
    """Sliding layers are kept with padding packing and caches."""
    model = spa.hf.apply(build("qwen3", **MIXED), FIRST)
    ids = tokens(2, 17)
    plain = logits(model, ids, use_cache=False)
    for cache in (
        transformers.DynamicCache(config=model.config),
        transformers.StaticCache(config=model.config, max_cache_len=30),
    ):
        pieces = ids.split([9, 1, 4, 3], dim=1)
        found = [logits(model, piece, past_key_values=cache) for piece in pieces]
        close(torch.cat(found, dim=1), plain, **EXACT)
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None]
    apart = [logits(model, part) for part in ids[:1].split([9, 8], dim=1)]
    for use_cache in (False, True):
        found = logits(model, ids[:1], position_ids=positions, use_cache=use_cache)
        close(found, torch.cat(apart, dim=1), **EXACT)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    wanted = model.generate(ids[1:, 6:], **GREEDY)[0, -8:].tolist()
    for cache in (None, "static"):
        found = model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)
        assert found[1, -8:].tolist() == wanted


@pytest.mark.parametrize("named", [{"layers": [0, 1]}, {"pattern": (SECOND, SECOND)}])
def test_a_window_is_replaced_when_told(named, tmp_path):
    mistral = {"sliding_window": WINDOW}
    for family, overrides in (("qwen3", MIXED), ("mistral", mistral)):
        keywords = {"pattern": SECOND, **named}
        model = spa.hf.apply(build(family, **overrides), **keywords)
        plain = {} if family == "qwen3" else {"sliding_window": None}
        stock = Masked(build(family, **plain), (SECOND, SECOND))
        ids = tokens(2, 17)
        wanted = stock(ids).logits
        close(logits(model, ids), wanted, **EXACT)
        for cache in (None, "static"):
            model.generate(ids, cache_implementation=cache, **GREEDY)
        model.save_pretrained(tmp_path / family)
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / family, dtype=torch.float64
        )
        close(logits(again, ids), wanted, **EXACT)


def test_a_window_beyond_the_span_is_no_obstacle():
    """Mistral's default window is 4096 tokens in every layer."""
    ids = tokens(1, 17)
    model = spa.hf.apply(build("mistral", sliding_window=FIRST.span), FIRST)
    wanted = logits(spa.hf.apply(build("mistral"), FIRST), ids)
    close(logits(model, ids), wanted, **EXACT)
    found = model.generate(ids, **GREEDY)  # grows beyond the window
    assert found.tolist() == model.generate(ids, use_cache=False, **GREEDY).tolist()


def test_a_shared_window_is_replaced_in_all_or_none():
    """One window for all layers is replaced in all or none."""
    overrides = {"sliding_window": WINDOW}
    model = build("mistral", **overrides)
    stock = logits(model, tokens(1, 17))
    with pytest.raises(ValueError, match="name them in `layers` to replace it"):
        spa.hf.apply(model, FIRST)
    with pytest.raises(ValueError, match=r"must be given to all layers or none .* got 1 of 2"):
        spa.hf.apply(model, FIRST, layers=[1])
    assert torch.equal(logits(model, tokens(1, 17)), stock)


def test_a_window_with_own_positions_stays():
    """A window with positions of its own is not replaced."""
    config = transformers.Gemma3TextConfig(
        **COMMON,
        **GROUPED,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = transformers.Gemma3ForCausalLM(config).double().eval()
    stock = Masked(model, (None, FIRST))
    ids = tokens(1, 17)
    wanted = stock(ids).logits
    with pytest.raises(
        ValueError, match=r"positions are encoded differently there, got layers \[0\]"
    ):
        spa.hf.apply(model, FIRST, layers=[0, 1])
    close(logits(spa.hf.apply(model, FIRST), ids), wanted.detach(), **EXACT)


def test_gpt_oss_keeps_its_sinks():
    config = transformers.GptOssConfig(
        **{**COMMON, **GROUPED, "intermediate_size": 16},
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
        experts_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).double().eval()
    for module in _attention(model):
        torch.nn.init.normal_(module.sinks)
    wanted = Masked(model, (None, FIRST))(tokens(1, 17)).logits
    before, stock = copy.deepcopy(model.config), logits(model, tokens(1, 17))
    for layers in (None, [0, 1]):
        with pytest.raises(
            ValueError, match="`sinks` must be False for GptOssAttention, which has its own"
        ):
            spa.hf.apply(model, FIRST, layers=layers, sinks=True)
    # Nothing was changed before the error.
    assert model.config.to_dict() == before.to_dict()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, tokens(1, 17)), stock)
    spa.hf.apply(model, FIRST)
    close(logits(model, tokens(1, 17)), wanted.detach(), rtol=0.0, atol=1e-6)


def test_only_the_text_decoder_changes(tmp_path):
    """Only the text decoder of a vision language model changes."""
    text = transformers.LlamaConfig(
        **COMMON,
        **GROUPED,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=1,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    ids = tokens(1, 12)
    ids[0, 2:6] = 1
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8).double()}
    patterns = (FIRST, SECOND)
    stock = Masked(model, (None, None))
    for module in _attention(stock.model.model.language_model):
        mask = patterns[module.layer_idx].mask(12)
        module.register_forward_pre_hook(Masked._hook(mask), with_kwargs=True)
    with torch.no_grad():
        wanted = stock.model(**inputs).logits
    spa.hf.apply(model, patterns, sinks=False)
    with torch.no_grad():
        close(model(**inputs).logits, wanted, **EXACT)
        assert model.config.vision_config._attn_implementation == "sdpa"
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path, dtype=torch.float64
        ).eval()
        close(again(**inputs).logits, wanted, **EXACT)
    assert again.config.vision_config._attn_implementation == "sdpa"
    assert again.config.text_config._attn_implementation == "spattention"
    again.save_pretrained(tmp_path / "again")
    twice = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert twice.text_config._attn_implementation == "spattention"
    generated = again.generate(**inputs, **GREEDY)
    assert generated.shape == (1, 20)


def _attention(model):
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


ELSEWHERE = {
    "Cohere2": {},
    "Exaone4": {"head_dim": 8},
    "Afmoe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "num_dense_layers": 2,
        "moe_intermediate_size": 16,
    },
}


@pytest.mark.parametrize("family", ELSEWHERE)
def test_a_window_that_more_depends_on_is_not_replaced(family):
    """These rotate positions in layers with a window alone."""
    config = getattr(transformers, f"{family}Config")(
        **COMMON,
        **GROUPED,
        **ELSEWHERE[family],
        sliding_window=WINDOW,
        layer_types=MIXED["layer_types"],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = tokens(2, 17)
    before = logits(model, ids)
    match = rf'in a model of type "{family.lower()}", where more .* got layers \[1\]'
    with pytest.raises(ValueError, match=match):
        spa.hf.apply(model, (FIRST, SECOND))
    close(logits(model, ids), before)
    spa.hf.apply(model, FIRST)  # keeps the window and what goes with it
    assert model.config.layer_types == MIXED["layer_types"]


def attention_classes(model_type):
    """Self-attention of decoders in the module of a model type."""
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    folder = config.__module__.split(".")[-2]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    classes = [c for name, c in vars(module).items() if name.endswith("Attention")]
    sources = {c: inspect.getsource(c) for c in classes if c.__module__ == module.__name__}
    return [
        c for c, code in sources.items() if "layer_idx" in code and "is_causal = False" not in code
    ]


@pytest.mark.parametrize("model_type", sorted(WINDOW_IS_ONLY_A_MASK))
def test_the_window_of_a_family_is_only_a_mask(model_type):
    """Read in the code that is installed, so that a family that changes is found."""
    if model_type not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {model_type}")
    classes = attention_classes(model_type)
    assert classes
    assert {kind.__name__: what_else(kind) for kind in classes} == {
        kind.__name__: () for kind in classes
    }


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("cohere2", {"sliding_window"}),
        ("exaone4", {"is_sliding", "sliding_window"}),
        ("afmoe", {"is_local_attention"}),
        ("gemma4_text", {"layer_type", "v_proj"}),
    ],
)
def test_the_reader_finds_what_else_depends_on_it(model_type, names):
    found = {name for kind in attention_classes(model_type) for name in what_else(kind)}
    assert found == names


NO_WINDOW = "`sliding_window` of the model's config must be at least 1, or None for attention"


@pytest.mark.parametrize("window", [-1, 0])
@pytest.mark.parametrize("layers", [None, [0, 1]])
def test_a_window_of_nothing_is_named(window, layers):
    """Transformers masks every key by it; elsewhere -1 stands for no window."""
    model = build("mistral", sliding_window=window)
    with pytest.raises(ValueError, match=NO_WINDOW):
        spa.hf.apply(model, FIRST, layers=layers)


@pytest.mark.parametrize("window", [-1, 0, WINDOW, 4096])
def test_a_window_under_bands_is_named(window):
    """Its mask would be taken for packed documents, and its cache drops keys that bands need."""
    model = spa.hf.apply(build("mistral"), FIRST)
    config = copy.deepcopy(model.config)
    config.sliding_window = window
    with pytest.raises(ValueError, match=f"`sliding_window` of .* got {window}"):
        transformers.AutoModelForCausalLM.from_config(config)
    model.config.sliding_window = window
    for cache in (None, spa.hf.BandCache(model.config)):
        with pytest.raises(ValueError, match=f"`sliding_window` of .* got {window}"):
            model(tokens(1, 5), past_key_values=cache, use_cache=False)
    model.config.sliding_window = None
    spa.hf.apply(build("mistral", sliding_window=4096), FIRST)(tokens(1, 5))
