"""A Trainer under DeepSpeed on one CPU process: `python tests/hf/deepspeed_run.py STAGE FOLDER`.

Prints the losses, and the model's sinks, as JSON; stage 0 trains without DeepSpeed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import spattention as spa

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untrusted_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # which is compiled
}


def main(stage: int, folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=61, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    model = transformers.LlamaForCausalLM(config)
    spa.hf.apply(model, spa.BandPattern.shared_local(4, 32, local=4), sinks=True)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(61, (32,), generator=generator) for _ in range(24)]
    # Under ZeRO-3 each process has a part of the weights; they are gathered to be saved.
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    arguments = transformers.TrainingArguments(
        str(folder),
        deepspeed={**CONFIG, "zero_optimization": zero} if stage else None,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"\n{json.dumps(losses)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
