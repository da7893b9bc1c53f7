"""Fine-tune a LoRA adapter on bands with TRL's SFTTrainer, documents packed into rows.

python examples/finetune_lora.py           # a CPU, under a minute; needs the extra `trl`

With a model of yours, `base` is its folder or its name on the hub.
"""

from __future__ import annotations

import tempfile

import small
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import spattention as spa


def main(steps: int = 20) -> dict[str, float]:
    text = small.read_documents(small.sample_path())[1]
    documents = Dataset.from_dict({"text": [part for part in text.split("\n\n") if part]})

    with tempfile.TemporaryDirectory() as folder:
        # An adapter names the folder of its base, and is opened on it: dense, or with these bands.
        base = small.saved_model(f"{folder}/base")
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        spa.hf.apply(model, spa.BandPattern.shared_local(small.HEADS, small.CONTEXT, local=32))
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                f"{folder}/adapter",
                max_steps=steps,
                per_device_train_batch_size=1,
                learning_rate=1e-2,
                max_length=small.CONTEXT,
                packing=True,  # documents in one row do not see one another
                report_to="none",
                disable_tqdm=True,
                logging_steps=5,
                gradient_checkpointing=False,
                bf16=False,
            ),
            train_dataset=documents,
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model()

        # What a user of the adapter does; it brings the bands back.
        again = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter").eval()
        same_bands = spa.hf.patterns(again) == spa.hf.patterns(trainer.model)
        ids = torch.tensor([tokenizer("Alice was")["input_ids"]])
        with torch.no_grad():
            difference = (again(ids).logits - trainer.model.eval()(ids).logits).abs().max()

        # A model without PEFT, for the commands and for servers; it has the bands too.
        again.merge_and_unload().save_pretrained(f"{folder}/merged")
        merged = AutoModelForCausalLM.from_pretrained(f"{folder}/merged").eval()
        same_bands = same_bands and spa.hf.patterns(merged) == spa.hf.patterns(trainer.model)
        cache = spa.hf.BandCache(merged.config)
        written = merged.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    print(
        f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps; opened again: "
        f"logits differ by {difference:g}, the same bands: {same_bands}"
    )
    print(tokenizer.decode(written[0]))
    found = {"first": losses[0], "last": losses[-1], "difference": float(difference)}
    return found | {"same_bands": same_bands}


if __name__ == "__main__":
    main()
