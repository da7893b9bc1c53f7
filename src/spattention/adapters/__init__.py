"""Bands in trainers that have attention modules of their own.

| module | trainer | in short |
|---|---|---|
| `olmo_core` | OLMo-core 3 | `apply(model, pattern)` after `build()` |
| `torchtitan` | torchtitan | `apply(model_config, pattern)` before `build()` |
| `axolotl` | Axolotl | a plugin, named in the YAML file |

Each needs its trainer. Extras install the first two; Axolotl pins older versions than this library
needs. Trainers that take any model of Transformers need no adapter: `spattention.hf.apply` comes
first, then the trainer.
"""
