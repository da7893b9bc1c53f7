"""Every script of `examples/` runs, shortened, and shows what it says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from notebook import run

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py"))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for path in SCRIPTS:  # other tests have modules of these names
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    yield importlib.import_module
    for path in SCRIPTS:
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_an_example_converts_and_trains(example):
    losses = example("finetune_trainer").main(steps=12)
    assert losses["fine-tuned"] < losses["converted"]
    assert losses["opened again"] == losses["fine-tuned"]


def test_an_example_fits_a_pattern(example):
    losses = example("fit_pattern").main(steps=4)
    assert losses["fitted"] == pytest.approx(losses["dense"], abs=0.1)


def test_an_example_has_a_module_of_its_own(example):
    assert max(example("own_module").main().values()) < 1e-5


def test_an_example_generates_beyond_the_span(example, monkeypatch):
    module = example("generate_beyond_span")
    monkeypatch.setattr(module, "LENGTH", 200)
    found = module.main(steps=2)
    assert found["same"]
    assert found["BandCache"] < 0.6 * found["DynamicCache"]


def test_an_example_trains_an_adapter(example):
    pytest.importorskip("trl")
    found = example("finetune_lora").main(steps=10)
    assert found["last"] < found["first"]
    assert found["difference"] == 0
    assert found["same_bands"]


def test_packed_rows_of_trl_keep_documents_apart(example, tmp_path):
    """SFTTrainer packs documents into rows; each has the logits that it has by itself."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig

    import spattention as spa

    small = example("small")
    model = spa.hf.apply(small.dense_model(), spa.BandPattern.shared_local(8, 256, local=8))
    documents = [list(range(length)) for length in (30, 50, 20, 60)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path),
            max_length=128,
            packing=True,
            per_device_train_batch_size=2,
            report_to="none",
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        processing_class=example("small").byte_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == len(documents)
    trainer.model.eval()
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids")}
        packed = trainer.model(**inputs).logits[0]
        for start, end in zip(starts, [*starts[1:], None]):
            alone = trainer.model(batch["input_ids"][:, start:end]).logits[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom():
    """What is stored in it is of the same kind, so that a reader sees it without running it."""
    path = FOLDER / "story.ipynb"
    shown = [kinds(cell) for cell in run(path)["cells"]]
    assert shown == [kinds(cell) for cell in json.loads(path.read_text())["cells"]]
    assert sum("image/png" in kind for kind in shown) == 4


def kinds(cell):
    return sorted(k for out in cell.get("outputs", ()) for k in out.get("data", {"text": ""}))
