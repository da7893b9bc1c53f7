"""Generate beyond the span of the bands with a cache of constant size.

python examples/generate_beyond_span.py    # a CPU, under a minute
"""

from __future__ import annotations

import tempfile

import small
import torch
from finetune_trainer import train
from transformers import DynamicCache

import spattention as spa

SPAN, LENGTH = 128, 400


def main(steps: int = 120) -> dict[str, object]:
    # Positions up to 512, bands up to 128: whatever lies farther back, no head looks at.
    model = small.dense_model(context=512)
    pattern = spa.BandPattern.shared_local(small.HEADS, SPAN, widths="geometric", local=16)
    spa.hf.apply(model, pattern)
    with tempfile.TemporaryDirectory() as folder:
        train(model, small.rows(200, 512), steps, folder)
    model.eval()

    prompt = torch.tensor([list(b"Alice was beginning to get very tired of sitting by her")])
    texts, sizes = {}, {}
    for name, cache in (
        ("BandCache", spa.hf.BandCache(model.config)),
        ("DynamicCache", DynamicCache(config=model.config)),
    ):
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=LENGTH - prompt.shape[1],
            do_sample=False,
            past_key_values=cache,
            pad_token_id=0,
        )
        texts[name] = tokens[0].tolist()
        held = [t for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t)]
        sizes[name] = cache.nbytes if name == "BandCache" else sum(t.nbytes for t in held)
    print(bytes(texts["BandCache"]).decode(errors="replace"))
    print(f"bytes of the cache after {LENGTH} tokens: {sizes}")
    return {"same": texts["BandCache"] == texts["DynamicCache"], **sizes}


if __name__ == "__main__":
    main()
