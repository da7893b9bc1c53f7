"""On a machine without a GPU the kernels run in Triton's interpreter, which must be chosen before
they are imported.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
