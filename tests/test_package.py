"""What `import spattention` costs and gives."""

import subprocess
import sys

import spattention

LIGHT = """
import time, sys
import torch
before = set(sys.modules)
start = time.process_time()
import spattention
spent = time.process_time() - start
names = ("transformers", "triton", "tyro", "matplotlib")
heavy = [m for m in names if m in sys.modules and m not in before]
print(spent, heavy)
"""


def test_import_takes_torch_alone_and_is_fast():
    """Import takes torch alone and under half a second."""
    result = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True
    )
    spent, heavy = result.stdout.split(" ", 1)
    assert float(spent) < 0.5
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


def test_every_name_is_listed():
    """Before anything was imported on first use."""
    code = "import spattention; assert set(spattention.__all__) <= set(dir(spattention))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_found_while_compiling():
    """A compiled function may be the first to ask for a name, without a break in its graph."""
    code = (
        "import torch, spattention\n"
        "from spattention.bands import BandPattern\n"
        "bands, query = BandPattern.exclusive(2, 16), torch.ones(1, 2, 16, 8)\n"
        "assert 'band_attention' not in vars(spattention)\n"
        "call = lambda q: spattention.band_attention(q, q, q, bands)\n"
        "torch.compile(call, fullgraph=True, backend='eager')(query)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
