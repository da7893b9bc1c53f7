"""Folders of saved models: whole ones open, damaged and foreign ones are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_model import edit, save

from spattention.loading import (
    _is_finite,
    model_digest,
    model_folder,
    open_config,
    open_model,
    open_tokenizer,
    open_weights,
)
from spattention.training.checkpoints import commit

Damage = Callable[[Path], Any]
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"), sinks=True)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def opened(folder: Path) -> Any:
    found = model_folder(folder)
    open_tokenizer(found)
    return open_model(found)


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def config(**changes: Any) -> Damage:
    return lambda folder: edit(folder / "config.json", **changes)


def pattern(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        section = json.loads((folder / "config.json").read_text())["spattention"]
        section["patterns"][0] |= changes
        edit(folder / "config.json", spattention=section)

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def pickled(content: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return damage


def indexed(weight_map: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


DAMAGED: list[tuple[Damage, str]] = [
    # Weights.
    (cut, "model.safetensors must be a whole file of safetensors"),
    (write("model.safetensors", b""), "model.safetensors must be a whole file of safetensors"),
    (write("model.safetensors", b"\xff" * 99), "model.safetensors must be a whole file of safe"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model must hold weights (model.safe"),
    (pickled({"a": os.system}), "pytorch_model.bin must hold tensors by name"),
    (pickled([torch.zeros(1)]), "pytorch_model.bin must hold tensors by name"),
    (indexed(None), "model.safetensors.index.json must have a `weight_map`, got NoneType"),
    (indexed({"a": "../model"}), "index.json must name files in its folder, got '../model'"),
    (indexed({"a": "gone.safetensors"}), "must name files in its folder, got 'gone.safetensors'"),
    (
        tensors(lambda found: found.pop("model.norm.weight")),
        "must describe the model in ",  # fewer values than the model has
    ),
    (
        tensors(lambda found: found.update(extra=found.pop("model.norm.weight"))),
        "describes: 1 are missing, model.norm.weight",
    ),
    (
        tensors(lambda found: found["model.norm.weight"].fill_(torch.nan)),
        "must hold finite weights, model.norm.weight has NaN or inf",
    ),
    # The config.
    (write("config.json", "[]"), "config.json must hold a JSON object, got list"),
    (write("config.json", ""), "config.json must hold a JSON object"),
    (write("config.json", DEEP), "config.json must hold a JSON object: maximum recursion"),
    (write("config.json", b"\xff\xfe"), "config.json must hold a JSON object"),
    (write("config.json", "{}"), "`model_type` that Transformers knows, got None"),
    (config(model_type="evil"), "`model_type` that Transformers knows, got 'evil'"),
    (config(model_type=3), "`model_type` that Transformers knows, got 3"),
    (config(model_type="t5"), "config.json must describe a decoder alone"),
    (config(model_type="vit"), "config.json must describe a causal language model"),
    (config(model_type="gpt2"), "config.json must describe the model in "),
    (config(max_position_embeddings=None), "'max_position_embeddings' expected int, got NoneType"),
    (config(max_position_embeddings=-1), "`max_position_embeddings` must be a positive integer"),
    (config(attention_chunk_size="8"), "`attention_chunk_size` must be an integer from 1 to 2,147"),
    (config(attention_chunk_size=2**63), "`attention_chunk_size` must be an integer from 1 to 2,"),
    (config(attention_chunk_size=0), "`attention_chunk_size` must be an integer from 1 to 2,147,4"),
    (config(eos_token_id="x"), "'eos_token_id' with value 'x'"),
    (config(num_attention_heads=0), "config.json must be a config of Transformers: ZeroDivision"),
    (config(num_attention_heads=5), "is not a multiple of the number of attention heads (5)"),
    (config(num_key_value_heads=3), "config.json must describe the model in "),
    (config(vocab_size=10**12), "32,808 parameters, got one of 64,000,000,015,528"),
    (config(vocab_size=100), "lm_head.weight must have the shape [100, 32], got [270, 32]"),
    (config(hidden_size=10**9), "config.json must describe the model in "),
    (
        config(num_hidden_layers=10**4, spattention=None, attn_implementation="sdpa"),
        "`num_hidden_layers` must be at most the 23 tensors",
    ),
    (
        config(rope_parameters={"rope_type": "magic"}),
        "must describe a causal language model: there",
    ),
    (config(hidden_act="magic"), "config.json must describe a causal language model: there is no"),
    (config(dtype="float7"), "config.json must be a config of Transformers"),
    (config(is_encoder_decoder=True), "config.json must describe a decoder alone"),
    (config(text_config=[]), "`text_config` must be an object, got list"),
    # Transformers makes a list of so many entries while it reads the config.
    (config(num_labels=10**9), "config.json: `num_labels` must be at most 65,536, got 1000000000"),
    (config(vision_config={"num_labels": 2**63}), "`num_labels` must be at most 65,536, got 922"),
    (config(quantization_config="x"), "config.json must be a config of Transformers"),
    (config(attn_implementation="own/kernel"), "got 'own/kernel': code from the hub is never run"),
    (config(attn_implementation="magic"), "must describe a causal language model"),
    (config(pad_token_id=10**5), "config.json must describe a causal language model"),
    # Bands.
    (config(spattention=None), "must have the section `spattention`, as `attn_impl"),
    (
        config(spattention=None, attn_implementation="bigbird"),
        "must have the section `bigbird`, as `attn_impl",
    ),
    (config(spattention=[]), "`config.spattention` must be a mapping, got list"),
    (pattern(span=2**29 + 1), "must be at most 536870912 tokens, got 536870913 in pattern 0"),
    (
        pattern(span=2**63),
        "`config.spattention`, pattern 0: `span` must fit in 64 bits, got",
    ),
    (pattern(version=9), "`config.spattention`, pattern 0: the pattern's `version`"),
    # The tokenizer, and what generation reads.
    (write("tokenizer.json", "{}"), "tokenizer.json must hold a tokenizer"),
    (write("tokenizer.json", "[]"), "tokenizer.json must hold a JSON object, got list"),
    (write("tokenizer.json", DEEP), "tokenizer.json must hold a JSON object: maximum recursion"),
    (write("tokenizer.json", '{"model": {"type": "BPE"}}'), "tokenizer.json must hold a tokenizer"),
    (
        lambda folder: edit(folder / "tokenizer_config.json", model_max_length=[3]),
        "tokenizer_config.json must hold a tokenizer: TypeError",
    ),
    (write("tokenizer_config.json", "[]"), "tokenizer_config.json must hold a JSON object"),
    (
        write("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["e.T", "e.T"]}}'),
        "tokenizer_config.json must name a tokenizer of Transformers",
    ),
    (write("generation_config.json", "[]"), "generation_config.json must hold a JSON object"),
    (write("generation_config.json", "x"), "generation_config.json must hold a JSON object"),
    (
        write("generation_config.json", '{"eos_token_id": 999}'),
        "must be a token below the 270 of the model, got 999",
    ),
    (write("adapter_config.json", "{}"), "must hold a whole model, got an adapter"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("damage", "error"), DAMAGED)
def test_damaged_folders_are_refused(copy: Path, damage: Damage, error: str) -> None:
    """Every message is one line that names a file and what it must hold."""
    damage(copy)
    with pytest.raises(ValueError, match="must") as caught:
        opened(copy)
    message = str(caught.value)
    assert error in message
    assert "\n" not in message
    assert str(copy) in message
    assert len(message) < 700


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("[]", "results.json must hold a JSON object, got list"),
        ("{}", "must name the folder of a saved model in "),
        ('{"model": ["x"]}', "as `model`, got ['x']"),
        ('{"model": "../model"}', "as `model`, got '../model'"),
        ('{"model": "gone"}', "as `model`, got 'gone'"),
        ('{"model": null}', "as `model`, got None"),
    ],
)
def test_foreign_results_are_refused(copy: Path, content: str, error: str) -> None:
    folder = copy.parent / "comparison"
    folder.mkdir()
    (folder / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results") as caught:
        model_folder(folder)
    assert error in str(caught.value)


def test_paths_without_a_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, error in (
        ("nowhere", "there is no such folder"),
        ("file", "there is no such folder"),
        ("", "it has none of them"),
        ("adapter", "merge it into its base"),
    ):
        with pytest.raises(ValueError, match=error):
            model_folder(tmp_path / name)


def test_a_checkpoint_is_compared_with_its_manifest(copy: Path) -> None:
    """A change that no other check sees is refused; one that can be described is described."""
    run = copy.parent / "run"
    run.mkdir()
    checkpoint = commit(copy, run)
    assert opened(checkpoint)
    edit(checkpoint / "config.json", max_position_embeddings=500)
    with pytest.raises(ValueError, match=r"config\.json .*remove .*manifest\.json"):
        model_folder(checkpoint)
    edit(checkpoint / "config.json", max_position_embeddings=-5)
    with pytest.raises(ValueError, match="must be a positive integer, got -5"):
        model_folder(checkpoint)


def test_whole_folders_open(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of no use are told, other spellings of weights are read."""
    tensors(lambda found: found.update(extra=torch.zeros(3)))(copy)
    model = opened(copy)
    assert "has 1 weights of no use: extra" in capsys.readouterr().err
    found = model.state_dict()
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    again = opened(copy).state_dict()
    assert all(torch.equal(again[name], found[name]) for name in found)
    assert open_weights(copy).elements == sum(p.numel() for p in model.parameters()) + 3


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    save(tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    tensors(lambda found: found.pop("lm_head.weight"))(tmp_path)
    model = opened(tmp_path)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_of_a_generation_config_only_tokens_are_kept(copy: Path) -> None:
    """How tokens are drawn is said by the command's options alone."""
    content = {"num_beams": 4, "top_p": 0.3, "eos_token_id": [3, 5], "max_length": 7}
    (copy / "generation_config.json").write_text(json.dumps(content))
    kept = opened(copy).generation_config
    assert kept.eos_token_id == [3, 5]
    assert (kept.num_beams, kept.top_p, kept.max_length) in ((None, None, None), (1, 1.0, 20))


def test_the_digest_tells_models_apart(copy: Path) -> None:
    first = model_digest(copy)
    assert model_digest(copy) == first
    edit(copy / "config.json", rms_norm_eps=1e-5)
    second = model_digest(copy)
    assert second != first
    tensors(lambda found: found["model.norm.weight"].mul_(2))(copy)
    assert model_digest(copy) not in (first, second)


def test_results_are_objects_whatever_the_config_says(copy: Path) -> None:
    edit(copy / "config.json", return_dict=False, output_hidden_states="all")
    assert opened(copy)(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 270)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_finite_weights_in_every_dtype(dtype: torch.dtype) -> None:
    values = torch.ones(3).to(dtype)
    assert _is_finite(values)
    assert _is_finite(values[:0])
    assert not _is_finite(torch.tensor([1.0, torch.nan, 2.0]).to(dtype))
    assert _is_finite(torch.tensor([1, 2]))


def test_a_config_alone_is_checked(saved: Path) -> None:
    assert open_config(saved).model_type == "llama"
