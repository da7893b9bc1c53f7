"""The validation loss of a run is the mean over its tokens, however windows fall into batches."""

import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from spattention.data.token_file import read_token_file, write_token_file
from spattention.data.tokens import TokenStream, Windows
from spattention.evaluation.perplexity import validation_loss
from spattention.training.metrics import METRICS, read_metrics
from spattention.training.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parent))
from small_run import recipe


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """To train on, and to be judged on: one window of short documents, three of a long one."""
    folder = tmp_path_factory.mktemp("streams")
    random = np.random.default_rng(0)
    long = [np.append(random.integers(8, 320, 39), 7).astype(np.uint16) for _ in range(11)]
    uneven = [np.array([9, 7], np.uint16)] * 16
    uneven.append(np.append(random.integers(8, 320, 95), 7).astype(np.uint16))
    paths = folder / "train.u16.xz", folder / "validation.u16.xz"
    for path, documents in zip(paths, (long, uneven)):
        write_token_file(path, TokenStream.from_documents(documents), 7)
    return paths


def test_documents_kept_apart_count_by_their_tokens(streams, tmp_path):
    found = []
    for micro_batch in (1, 2, 4):
        folder = tmp_path / str(micro_batch)
        changes = {
            "validation": str(streams[1]),
            "validation_windows": 0,
            "across_documents": False,
            "batch": 4,
            "micro_batch": micro_batch,
            "balance_loss": 0.0,
            "learning_rate": 3e-2,
        }
        pretrain(recipe(streams[0], **changes), folder)
        found.append([e["eval_loss"] for e in read_metrics(folder / METRICS) if "eval_loss" in e])
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-8")
    windows = Windows(read_token_file(streams[1]), 32, across_documents=False)
    assert found[2][-1] == pytest.approx(validation_loss(model, windows).loss.mean, abs=1e-4)
    for other in found[:2]:
        assert other == pytest.approx(found[2], abs=1e-4)


def test_a_run_without_validation(streams, tmp_path):
    assert pretrain(recipe(streams[0], held_out=0.0), tmp_path / "run").finished
    entries = read_metrics(tmp_path / "run" / METRICS)
    assert not any("eval_loss" in entry for entry in entries)
    assert sum("loss" in entry for entry in entries) == 8


def test_a_run_ends_with_a_validation_loss(streams, tmp_path):
    """Also where `evaluate_every` does not divide its steps."""
    changes = {"validation": str(streams[1]), "evaluate_every": 3}
    pretrain(recipe(streams[0], **changes), tmp_path / "run")
    entries = read_metrics(tmp_path / "run" / METRICS)
    assert [e["step"] for e in entries if "eval_loss" in e] == [3, 6, 8]
