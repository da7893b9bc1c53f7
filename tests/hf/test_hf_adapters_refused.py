"""Adapters that do not fit the model, and damaged ones: refused by name."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import transformers
from adapted import CONFIGS, IDS, PATTERNS, banded, base, dense, folder_of, peft, saved
from tiny import FIRST, HEADS, SECOND, P, logits

FOREIGN = safetensors.torch.save({"a": torch.zeros(2)})
__all__ = ["base", "saved"]  # fixtures


def test_an_adapter_on_other_bands_is_refused(saved, base):
    path = folder_of(saved, "lora")
    match = "must be loaded into a model with the `config.spattention` that it was trained with"
    for pattern, sinks in (([SECOND, FIRST], True), (PATTERNS, False)):
        with pytest.raises(ValueError, match=match):
            peft.PeftModel.from_pretrained(banded(base, sinks, pattern), path)
        with pytest.raises(ValueError, match=match):
            banded(base, sinks, pattern).load_adapter(str(path))
        model = peft.get_peft_model(banded(base, sinks, pattern), CONFIGS["lora"]())
        with pytest.raises(ValueError, match=match):
            model.load_adapter(path, "default")
        with pytest.raises(ValueError, match=match):
            model.load_adapter(path, "second")


def test_a_mismatch_names_what_differs(saved, base):
    """Two whole sections of a fitted model fill many screens."""
    path = folder_of(saved, "lora")
    plain = P((((0, 3), (5, 9)),) * HEADS, 24)
    for pattern, sinks, said in (
        ([plain, SECOND], True, "patterns[0].intervals[0]"),
        (plain, True, "layers[1] 1, got 0"),
        (PATTERNS, False, "sinks True, got False"),
    ):
        with pytest.raises(ValueError, match=r"that it was trained with, ") as caught:
            peft.PeftModel.from_pretrained(banded(base, sinks, pattern), path)
        assert said in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_dense_model_with_adapters_is_not_changed(saved, base):
    model = peft.get_peft_model(dense(base), CONFIGS["lora"]())
    before = logits(model.eval(), IDS)
    with pytest.raises(ValueError, match=r"must have `config.spattention` before the adapter of"):
        model.load_adapter(folder_of(saved, "lora"), "second")
    assert torch.equal(logits(model, IDS), before)


def test_an_adapter_without_its_sinks_is_refused(saved, base, tmp_path):
    for file in folder_of(saved, "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.1.self_attn.sinks.weight"]
    safetensors.torch.save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    match = r"must hold the sinks that its config names, got no .*layers\.1\.self_attn\.sinks"
    with pytest.raises(ValueError, match=match):
        peft.PeftModel.from_pretrained(dense(base), tmp_path)
    with pytest.raises(ValueError, match=match):
        dense(base).load_adapter(str(tmp_path))


def damage(text, **change):
    config = json.loads(text)
    for name, value in change.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    return json.dumps(config)


def section(**change):
    config = {"version": 1, "patterns": [FIRST.to_dict()], "layers": [0, 0], "sinks": True}
    return {**config, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spattention": None}, "must be the section of the model .* got None"),
        ({"spattention": [1]}, r"must be the section of the model .* got \[1\]"),
        ({"spattention": section(version=2)}, "must have version 1 .* got 2"),
        ({"spattention": section(layers=[0])}, "one entry of `layers` per text layer, 2"),
        ({"spattention": section(sinks="yes")}, "must have a bool for `sinks`"),
        ({"spattention": section(patterns=[P.dense(3, 8).to_dict()])}, "has 3 heads but layer 0"),
        ({"spattention": section(patterns=[{"span": 2**63}])}, "`spattention` of"),
        (
            {"spattention": section(patterns=[P.dense(HEADS, 2**30).to_dict()])},
            "`span` of a pattern .* must be at most",
        ),
        ({"spattention": {"foreign": 1}}, "must have version 1"),
    ],
)
def test_a_damaged_adapter_config_is_refused(change, message, saved, base, tmp_path):
    for file in folder_of(saved, "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "adapter_config.json"
    path.write_text(damage(path.read_text(), **change))
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(dense(base), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        dense(base).load_adapter(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"", r"adapter_config\.json must hold a JSON object"),
        ("adapter_config.json", b"{", r"adapter_config\.json must hold a JSON object"),
        ("adapter_config.json", b"\xff\xfe\x00", r"adapter_config\.json must hold a JSON object"),
        ("adapter_config.json", b"[" * 99_999, r"adapter_config\.json must hold a JSON object"),
        ("adapter_config.json", b"[]", r"adapter_config\.json must hold a JSON object, got list"),
        ("adapter_config.json", b"null", r"adapter_config\.json must hold a JSON .* got NoneType"),
        ("adapter_config.json", b"{}", r"adapter_config\.json must hold .* `peft_type`, got None"),
        ("adapter_model.safetensors", b"", r"adapter_model\.safetensors must hold weights"),
        ("adapter_model.safetensors", b"\x08", r"adapter_model\.safetensors must hold weights"),
        (
            "adapter_model.safetensors",
            b"\xff" * 99,
            r"adapter_model\.safetensors must hold weights",
        ),
        ("adapter_model.safetensors", FOREIGN, "must hold the (sinks|weights) that .* got no "),
    ],
)
def test_a_damaged_adapter_file_is_refused(name, content, message, saved, base, tmp_path):
    for file in folder_of(saved, "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content)
    model = peft.PeftModel.from_pretrained(dense(base), folder_of(saved, "lora"))
    for way in (
        lambda: peft.PeftModel.from_pretrained(dense(base), tmp_path),
        lambda: peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path)),
        lambda: transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)),
        lambda: dense(base).load_adapter(str(tmp_path)),
        lambda: model.load_adapter(str(tmp_path), "default"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            way()
        assert str(tmp_path) in str(caught.value)


def test_a_cut_adapter_file_is_named(saved, base, tmp_path):
    """Cut, of another kind, a folder, or not there at all."""
    for file in folder_of(saved, "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    load = peft.PeftModel.from_pretrained
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors must hold weights"):
        load(dense(base), tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"must hold adapter_model\.safetensors or"):
        load(dense(base), tmp_path)
    weights.mkdir()
    with pytest.raises(OSError, match=r"adapter_model\.safetensors cannot be read"):
        load(dense(base), tmp_path)
    weights.rmdir()
    other = tmp_path / "adapter_model.bin"
    for content, match in ((b"text", "bin must hold weights"), (None, "bin must hold tensors by")):
        if content is None:
            torch.save([1, 2], other)
        else:
            other.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            load(dense(base), tmp_path)


def test_a_foreign_adapter_file_without_sinks_is_named(saved, base, tmp_path):
    for file in folder_of(saved, "lora", sinks=False).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(FOREIGN)
    match = r"must hold the weights that its config names, got no .*lora_A"
    with pytest.raises(ValueError, match=match):
        peft.PeftModel.from_pretrained(dense(base), tmp_path)
    with pytest.raises(ValueError, match=match):
        dense(base).load_adapter(str(tmp_path))


def test_every_loader_compares_marks(saved, base, tmp_path):
    """Weights that were trained on bands, whose config lost its section."""
    for file in folder_of(saved, "lora", sinks=False).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "adapter_config.json"
    plain = {"peft_type": "LORA", "modules_to_save": None, "spattention": None}
    config = {**json.loads(path.read_text()), **plain}
    del config["spattention"]
    path.write_text(json.dumps(config))
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")

    def ways(model):
        yield lambda: model().load_adapter(str(tmp_path))
        yield lambda: peft.PeftModel.from_pretrained(model(), tmp_path)
        yield lambda: model().load_adapter(
            adapter_state_dict=dict(weights), peft_config=CONFIGS["lora"]()
        )

    match = "must be loaded into a model with the attention that"
    for model in (lambda: dense(base), lambda: banded(base, False, [SECOND, FIRST])):
        for way in ways(model):
            with pytest.raises(ValueError, match=match):
                way()
    with pytest.raises(ValueError, match=match):
        transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    for way in ways(lambda: banded(base, False)):
        way()
    model = banded(base, False)
    model.load_adapter(str(tmp_path))
    expected = peft.PeftModel.from_pretrained(banded(base, False), tmp_path)
    torch.testing.assert_close(logits(model.eval(), IDS), logits(expected.eval(), IDS))


@pytest.mark.parametrize("sinks", [False, True])
def test_an_adapter_without_its_section_is_refused(sinks, base, tmp_path):
    """What was trained on bands is not saved as if it were for a dense model."""
    model = peft.get_peft_model(banded(base, sinks), CONFIGS["lora"]())
    inside = model.get_base_model()
    inside.set_attn_implementation("sdpa")
    del inside.config.spattention
    with pytest.raises(ValueError, match=r"`config\.spattention` must be there to save an adapter"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("adapters", [["default"], ["default", "second"]])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_mix_of_adapters_does_not_lose_their_sinks(kind, adapters, base):
    """PEFT mixes its own layers alone: the mix of IA3 would have had the base model's sinks."""
    model = peft.get_peft_model(banded(base), CONFIGS[kind]())
    model.add_adapter("second", CONFIGS[kind]())
    match = r"model with sinks, which it does not mix, got .*\['default', 'second'\]"
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(adapters, [0.5] * len(adapters), "mix")
    assert set(model.peft_config) == {"default", "second"}
    plain = peft.get_peft_model(banded(base, sinks=False), CONFIGS[kind]())
    plain.add_weighted_adapter(["default"], [0.5], "mix")
    assert set(plain.peft_config) == {"default", "mix"}


def test_prefix_tuning_of_bands_is_refused(base):
    """A learned key is at no distance; the first pass named a cache that nobody had given."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    match = r"`peft_type` must be one that learns no keys .* got PREFIX_TUNING"
    with pytest.raises(ValueError, match=match):
        peft.get_peft_model(banded(base), config)
    model = peft.get_peft_model(banded(base), CONFIGS["lora"]())
    with pytest.raises(ValueError, match=match):
        model.add_adapter("learned", config)
    tuned = peft.get_peft_model(dense(base), config)
    assert logits(tuned, IDS).isfinite().all()
