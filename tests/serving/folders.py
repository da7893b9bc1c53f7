"""Tiny band models in folders, as they are saved for an engine, and Transformers' answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import spattention as spa

P = spa.BandPattern
VOCABULARY = 96
SPAN = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **shape: transformers.LlamaConfig(**COMMON | shape),
    "mistral": lambda **shape: transformers.MistralConfig(**COMMON | shape, sliding_window=None),
    "qwen3": lambda **shape: transformers.Qwen3Config(**COMMON | shape, head_dim=16),
    "olmoe": lambda **shape: transformers.OlmoeConfig(
        **COMMON | shape, num_experts=4, num_experts_per_tok=2
    ),
    "olmo3": lambda **shape: transformers.Olmo3Config(
        # vLLM's own attention on the CPU, for the layer with a window, has heads of 32 or more.
        **COMMON | {"hidden_size": 128} | shape,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    ),
}
# Two layers that differ, and heads of one key/value head that differ: a far head first, a near one
# last, so that classes of heads have to be put back into order.
FIRST = P((((0, 4), (40, SPAN)), ((0, 30),), ((0, 9),), ((0, 2), (5, 17))), SPAN)
SECOND = P((((0, 12),), ((0, 1),), ((0, 25),), ((0, 3), (30, 80))), SPAN)


# OLMo 3 encodes positions differently in its layers with a window, which therefore keep it.
PATTERNS: dict[str, tuple[P | None, ...]] = {"olmo3": (None, SECOND)}


def save(
    folder: Path,
    family: str = "llama",
    patterns: tuple[P | None, ...] | None = None,
    sinks: bool = False,
    **shape: int,
) -> Path:
    """A band model in float32 with a tokenizer of words `w0` to `w95`."""
    torch.manual_seed(0)
    config = CONFIGS[family](**shape)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spa.hf.apply(model, patterns or PATTERNS.get(family, (FIRST, SECOND)), sinks=sinks)
    if sinks:
        for name, parameter in model.named_parameters():
            if name.endswith(".sinks"):
                torch.nn.init.normal_(parameter, std=2.0)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    stock = type(model).__name__.removeprefix("Spattention")
    edit(folder, architectures=[f"Spattention{stock}"])
    return folder


def save_adapter(folder: Path, merged: Path, adapter: Path) -> None:
    """A random LoRA adapter of the attention of a folder's model, and the model that it makes."""
    from safetensors.torch import save_file

    spa.hf.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator, weights = torch.Generator().manual_seed(0), {}
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    for name, module in model.named_modules():
        if name.endswith(names):
            wide, high = module.in_features, module.out_features
            down = torch.randn(4, wide, generator=generator) / wide**0.5
            up = torch.randn(high, 4, generator=generator) / 2
            module.weight.data += up @ down
            weights[f"base_model.model.{name}.lora_A.weight"] = down
            weights[f"base_model.model.{name}.lora_B.weight"] = up
    model.save_pretrained(merged)
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": names}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def edit(folder: Path, **entries: Any) -> None:
    """Change entries of the folder's config; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in entries.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    path.write_text(json.dumps(config))


def greedy(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Transformers' greedy continuations of token ids, one prompt at a time."""
    spa.hf.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    continuations = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        continuations.append(out[0, len(prompt) :].tolist())
    return continuations


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
