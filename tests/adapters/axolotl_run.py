"""Axolotl's own training loop with the plugin: LoRA on packed documents, a few steps on a CPU.

python tests/adapters/axolotl_run.py FOLDER    prints the losses and the model's attention as JSON

A process of its own: Axolotl changes Transformers' classes in place.
"""

import json
import os
import random
import sys
from pathlib import Path

import torch
import transformers
import yaml

from spattention.data.tokenizer import for_transformers, train_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
CONTEXT = 256


def make_inputs(folder: Path) -> Path:
    """A tiny dense model, documents, and a YAML file that names them."""
    tokenizer = for_transformers(train_tokenizer(["a"], 257), CONTEXT, 0)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "dense")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    source = random.Random(0)
    texts = [" ".join(source.choices(WORDS, k=source.randint(5, 25))) for _ in range(200)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "data.jsonl").write_text(lines)
    fields = {
        "base_model": str(folder / "dense"),
        "plugins": ["spattention.adapters.axolotl.BandPlugin"],
        "band_pattern": "shared_local:widths=geometric,local=8",
        "attn_implementation": "sdpa",
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "completion"}],
        "sequence_len": CONTEXT,
        "sample_packing": True,
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        # Axolotl's fused LoRA kernels need a GPU.
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "val_set_size": 0,
        "bf16": False,
        "dataset_processes": 1,
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(fields))
    return folder / "run.yaml"


def main(folder: Path) -> None:
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    cfg = load_cfg(str(make_inputs(folder)))
    _, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=None))
    config = trainer.model.config
    found = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "section": config.spattention,
    }
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
