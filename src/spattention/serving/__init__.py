"""Back ends of inference engines over paged caches.

| module | holds |
|---|---|
| `head_classes` | key/value heads whose cache blocks are freed together |
| `paged` | attention over a paged cache, and writing into it; torch alone |
| `checks` | checks of a model folder and an engine's settings |
| `vllm_backend` | vLLM's attention back end |
| `vllm_models` | the model classes that vLLM builds for band models |
| `vllm_plugin` | their registration; `spattention.vllm.register` |
"""
