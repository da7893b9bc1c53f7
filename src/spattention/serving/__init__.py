"""Back ends of inference engines over paged caches.

| module | holds |
|---|---|
| `paged_decode` | `paged_attention`: the newest tokens of each request |
| `head_classes` | key/value heads whose cache blocks are freed together |
| `class_streams` | streams on which classes of heads decode side by side |
| `class_store` | new keys of all classes of heads of a layer, stored by one launch |
| `paged` | one step of an engine over a paged cache, and writing into it |
| `checks` | checks of a model folder and an engine's settings |
| `marks` | marks among a folder's weights, checked against its config |
| `vllm_backend` | vLLM's attention back end |
| `vllm_models` | the model classes that vLLM builds for band models |
| `vllm_plugin` | their registration; `spattention.vllm.register` |
| `slots` | attention over a pool with one slot per token |
| `sglang_backend` | SGLang's attention back end |
| `sglang_models` | the model classes that SGLang builds for band models |
| `sglang_plugin` | their registration; `spattention.sglang.register` |
"""

from .paged_decode import paged_attention

__all__ = ["paged_attention"]
