"""What `import spattention` costs and gives."""

import subprocess
import sys

import spattention

LIGHT = """
import time, sys
import torch
start = time.perf_counter()
import spattention
spent = time.perf_counter() - start
heavy = [m for m in ("transformers", "triton", "tyro", "matplotlib") if m in sys.modules]
print(spent, heavy)
"""


def test_import_takes_torch_alone_and_under_half_a_second():
    before = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print('triton' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True
    )
    spent, heavy = result.stdout.split(" ", 1)
    assert float(spent) < 0.5
    if before.stdout.strip() == "False":
        assert heavy.strip() == "[]"


def test_transformers_missing_is_named():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import spattention\n"
        "try:\n    spattention.hf\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "spattention[hf]" in result.stdout


def test_every_public_name_is_there():
    for name in spattention.__all__:
        assert getattr(spattention, name) is not None
    for name in ("BandPattern", "band_attention", "band_attention_varlen", "validate", "merge"):
        assert name in spattention.__all__
