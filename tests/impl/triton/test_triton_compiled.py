"""What the interpreter cannot tell: that the kernels compile, fit a GPU, and are told apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def compiled(script: str, cache: Path) -> list[list[str]]:
    """What a script beside this file prints, by lines and words, where nothing is interpreted."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        ),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_decoding_kernels_fit_shared_memory(tmp_path: Path) -> None:
    lines = compiled("compile_decode.py", tmp_path)
    found = [[int(number) for number in line] for line in lines]
    assert len(found) == 10
    assert all(shared <= limit for shared, limit in found), found


def test_the_store_of_classes_compiles(tmp_path: Path) -> None:
    assert compiled("compile_store.py", tmp_path) == [["store_kernel", "0"]] * 2


def test_a_joined_log_sum_exp_is_stored_last(tmp_path: Path) -> None:
    """Other warps may still load what was joined, for the rows of `out`: a warp that is ahead waits
    for them before it stores.
    """
    lines = compiled("compile_merge.py", tmp_path)
    assert [line[-2:] for line in lines] == [["bar.sync", "st.global"]] * 2


def test_cached_kernels_are_those_of_triton(tmp_path: Path) -> None:
    """A key that left something out would launch a kernel made for other strides or alignments."""
    repeated = {name: int(forms) for name, forms in compiled("compare_cached.py", tmp_path)}
    assert repeated.pop("hopper.forward_queue.reset_kernel") == 1  # its argument is always the same
    assert set(repeated) == {
        "portable.forward.forward_kernel",
        "portable.query_gradient.query_gradient_kernel",
        "portable.key_gradient.key_gradient_kernel",
        "hopper.forward.forward_kernel",
        "hopper.forward_persistent.forward_kernel",
        "hopper.backward_preprocess.preprocess_kernel",
        "hopper.backward.backward_kernel",
        "decode.kernels.chunk_kernel",
        "decode.merge.combine_kernel",
        "decode.append.append_kernel",
        "spattention.serving.class_store.store_kernel",
    }
    assert min(repeated.values()) > 3, repeated
