"""What the plugin tells SGLang, and how SGLang's models get their bands."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spattention as spa
from spattention.hf.apply import band_note
from spattention.hf.weights import MARK, _mark
from spattention.serving.checks import BACKEND, SGLANG_FAMILIES
from spattention.serving.sglang_plugin import (
    REFUSED,
    choose_backend,
    find_model,
    register,
)

from . import fake_sglang
from .test_serving_checks import PATTERN, config, section

HOOK = "sglang.srt.model_loader.utils.get_model_architecture"
ARCHITECTURE = "SpattentionLlamaForCausalLM"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> fake_sglang.Registry:
    return fake_sglang.install(monkeypatch)


def settings(**changes: Any) -> Any:
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    graphs = SimpleNamespace(prefill=SimpleNamespace(backend="breakable"))
    defaults = dict.fromkeys(names) | REFUSED | {"kv_cache_dtype": "auto", "tp_size": 1}
    defaults |= {"model_impl": "auto", "cuda_graph_config": graphs}
    return SimpleNamespace(**defaults | changes)


def banded(**changes: Any) -> Any:
    made = config(section())
    made.architectures = [ARCHITECTURE]
    made.update(changes)
    return made


def test_registering_twice_is_as_once(registry: fake_sglang.Registry) -> None:
    register()
    register()
    assert list(registry.backends) == registry.choices == [BACKEND]
    assert registry.hooks == {HOOK: find_model}
    ((predicate, provider),) = registry.providers
    assert predicate("LlamaForCausalLM")
    assert provider is choose_backend


def test_the_back_end_is_chosen_for_bands_alone(registry: fake_sglang.Registry) -> None:
    assert choose_backend(settings(), banded()) == {"attention_backend": BACKEND}
    assert choose_backend(settings(attention_backend=BACKEND), banded())
    stock = config()
    stock.architectures = ["LlamaForCausalLM"]
    assert choose_backend(settings(speculative_algorithm="EAGLE"), stock) == {}
    with pytest.raises(ValueError, match="`attention_backend` must not be 'spattention' for a mod"):
        choose_backend(settings(attention_backend=BACKEND), stock)


def test_models_of_several_parts_are_left_alone(registry: fake_sglang.Registry) -> None:
    """Transformers cannot say which part of some of them is the text model."""
    stock = config()
    stock.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    stock.get_text_config = pytest.fail
    stock.thinker_config, stock.talker_config = config(), config()
    assert choose_backend(settings(), stock) == {}
    given = SimpleNamespace(hf_config=stock)
    assert find_model(lambda model_config: model_config, given) is given
    stock.thinker_config = banded()
    with pytest.raises(ValueError, match="the families that spattention serves, got"):
        choose_backend(settings(), stock)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_backend": "fa3"}, "`attention_backend` must be 'spattention' .* got 'fa3'"),
        ({"decode_attention_backend": "triton"}, "`decode_attention_backend` must be 'spattenti"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "`kv_cache_dtype` must be one of .* got 'fp8_e4m3'"),
        ({"speculative_algorithm": "EAGLE"}, "`speculative_algorithm` must be None .* got 'EAGLE'"),
        ({"enable_hierarchical_cache": True}, "`enable_hierarchical_cache` must be False"),
        ({"disaggregation_mode": "decode"}, "`disaggregation_mode` must be 'null'"),
        ({"tp_size": 3}, "must divide the model's 4 query heads, got 3"),
        ({"model_impl": "transformers"}, "`model_impl` must be 'auto' or 'sglang' .* got 'transf"),
        (
            {"cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="full"))},
            "`cuda_graph_backend_prefill` must be 'breakable' or 'disabled' .* got 'full'",
        ),
    ],
)
def test_settings_are_refused_by_name(
    registry: fake_sglang.Registry, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        choose_backend(settings(**changes), banded())
    assert "\n" not in str(raised.value)


def test_a_plain_cache_in_bf16_is_served(registry: fake_sglang.Registry) -> None:
    """SGLang's own short name."""
    assert choose_backend(settings(kv_cache_dtype="bf16"), banded())


def test_other_sglang_versions_are_refused(
    registry: fake_sglang.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.__version__", "0.5.24")
    with pytest.raises(ValueError, match=r"at least 0.5.23 and below 0.5.24 .* got 0.5.24"):
        choose_backend(settings(), banded())


@pytest.mark.parametrize("seam", [lambda c: choose_backend(settings(), c), None])
def test_no_folder_loses_its_bands(registry: fake_sglang.Registry, seam: Any) -> None:
    """A folder with bands that names a stock architecture, and the reverse, end SGLang's start."""
    seam = seam or (lambda c: find_model(pytest.fail, SimpleNamespace(hf_config=c)))
    with pytest.raises(ValueError, match="which would run it without its bands"):
        seam(banded(architectures=["LlamaForCausalLM"]))
    with pytest.raises(ValueError, match="the families that spattention serves, got"):
        seam(banded(architectures=["SpattentionOlmo3ForCausalLM"]))
    lost = config()
    lost.architectures = [ARCHITECTURE]
    with pytest.raises(ValueError, match="the folder has lost its bands"):
        seam(lost)


def test_models_are_registered_where_built(registry: fake_sglang.Registry) -> None:
    """All families, and only once; nothing else may build a model with bands."""

    def original(model_config: Any) -> Any:
        name = model_config.hf_config.architectures[0]
        return registry.models.get(name), name

    stock = config()
    stock.architectures = ["LlamaForCausalLM"]
    find_model(original, SimpleNamespace(hf_config=stock))
    assert registry.models == {}
    for family in SGLANG_FAMILIES:
        given = banded(architectures=[f"Spattention{family}"])
        found, _ = find_model(original, SimpleNamespace(hf_config=given))
        assert found.__name__ == f"Spattention{family}"
    assert sorted(registry.models) == [f"Spattention{family}" for family in SGLANG_FAMILIES]
    with pytest.raises(ValueError, match="must be built by spattention, got TransformersForCaus"):
        find_model(
            lambda model_config: (None, "TransformersForCausalLM"),
            SimpleNamespace(hf_config=banded()),
        )


def model(given: Any) -> Any:
    families = import_module("spattention.serving.sglang_models.families")
    return getattr(families, given.architectures[0])(given)


def with_sinks(sinks: bool = True) -> Any:
    return banded(spattention=section(sinks=sinks))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_get_their_heads_and_sinks(registry: fake_sglang.Registry, ranks: int) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 3.0])
    for rank in range(ranks):
        registry.parallel.attn_tp_size, registry.parallel.attn_tp_rank = ranks, rank
        made = model(with_sinks())
        names = made.load_weights(
            [
                ("layers.0.sinks", sinks),
                (f"layers.0.{MARK}", _mark(band_note(PATTERN), None)),
                ("layers.0.weight", sinks),
            ]
        )
        assert names == {"layers.0.weight"}
        first, second = (owner.attn for owner in made.layers)
        heads = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        assert first.bands.pattern == PATTERN.heads(heads.start, heads.stop)
        assert first.bands.sinks.equal(sinks[heads])
        assert not hasattr(second, "bands")


def test_weights_of_other_bands_end_the_start(registry: fake_sglang.Registry) -> None:
    """A config that was edited names other bands than the weights were trained with."""
    other = spa.BandPattern.dense(PATTERN.num_heads, PATTERN.span)
    with pytest.raises(ValueError, match="with the attention that they were saved from"):
        model(banded()).load_weights([(f"layers.0.{MARK}", _mark(band_note(other), None))])


@pytest.mark.parametrize("in_use", [("fa3", BACKEND), (BACKEND, "triton")])
def test_other_back_ends_never_run_bands(
    registry: fake_sglang.Registry, in_use: tuple[str, str]
) -> None:
    """Whatever else SGLang chose, for one mode or both, a model with bands is not built for it."""
    registry.in_use = in_use
    with pytest.raises(ValueError, match="_attention_backend` must be 'spattention' for a model"):
        model(banded())


def test_missing_sinks_end_the_start(registry: fake_sglang.Registry) -> None:
    with pytest.raises(ValueError, match=r"must hold numbers for layers\.0\.sinks, got none"):
        model(with_sinks()).load_weights([])
    assert model(with_sinks(False)).load_weights([]) == set()


def test_ignored_windows_end_the_start(registry: fake_sglang.Registry) -> None:
    """A layer without a pattern whose window SGLang's model ignores."""
    kinds = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="layer 1 must have a pattern, since SGLang's model ignor"):
        model(banded(sliding_window=16))
    with pytest.raises(ValueError, match="layer 1 must have a pattern"):
        model(banded(sliding_window=16, layer_types=kinds))
    model(banded(sliding_window=16, layer_types=kinds[::-1]))


def test_other_forms_of_attention_are_refused(registry: fake_sglang.Registry) -> None:
    made = model(banded())
    families = import_module("spattention.serving.sglang_models.families")
    for name, given in (
        ("logit_cap", 30.0),
        ("is_cross_attention", True),
        ("sliding_window_size", 15),
    ):
        attention = fake_sglang.RadixAttention(4, 16, 0.25, 2, 0)
        setattr(attention, name, given)
        with pytest.raises(ValueError, match=f"`{name}` of a layer must be"):
            families.check_layer(attention)
    registry.parallel.attn_tp_size = 2
    with pytest.raises(ValueError, match="must have 2 query heads on each of 2 ranks, got 4"):
        families.give_bands(made, banded())


def test_sglang_missing_is_named() -> None:
    code = (
        "import sys; sys.modules['sglang'] = None\n"
        "try:\n    import spattention.sglang\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"install `spattention\[sglang\]`", done.stdout)


def test_the_entry_point_is_declared() -> None:
    """By the name of the group that SGLang reads."""
    content = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    points = tomllib.loads(content)["project"]["entry-points"]["sglang.srt.plugins"]
    assert points == {BACKEND: "spattention.sglang:register"}
