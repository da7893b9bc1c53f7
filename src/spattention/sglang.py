"""SGLang serves band models: `pip install 'spattention[sglang]' && sglang serve FOLDER`.

SGLang finds `register` by the entry point `sglang.srt.plugins`; nobody has to call it.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("sglang") is None:
    raise ImportError("`spattention.sglang` needs SGLang: install `spattention[sglang]`")

from .serving.sglang_plugin import register

__all__ = ["register"]
