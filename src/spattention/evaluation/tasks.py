"""Tasks of the lm-evaluation-harness, from the hub or from local files (extra `spattention[eval]`).

The prompts and the scores are the harness's own. For a local file, its configuration of the task is
included, and only the place of the data is changed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import did_you_mean
from .items import read_items
from .perplexity import Mean

Sample = Mapping[str, Any]
METRICS = ("acc", "acc_norm", "perplexity")


@dataclass(frozen=True)
class Local:
    """The items of a task in a folder of JSON lines.

    Args:
        config: the harness's configuration, below its folder of tasks.
        file: the file of the items.
        split: the split that the configuration reads.
        changes: entries of the configuration that read the file's fields, where they differ from
            the hub's.
    """

    config: str
    file: str
    split: str = "validation"
    changes: tuple[tuple[str, str], ...] = ()


ASKED = (
    ("doc_to_text", "{{query}}"),
    ("doc_to_choice", "{{choices}}"),
    ("doc_to_target", "{{gold}}"),
    ("doc_to_decontamination_query", "{{query}}"),
)
LOCAL = {
    "hellaswag": Local("hellaswag/hellaswag.yaml", "hellaswag_val.jsonl"),
    "winogrande": Local("winogrande/default.yaml", "winogrande_xl_val.jsonl"),
    "copa": Local("super_glue/copa/default.yaml", "copa_val.jsonl"),
    "piqa": Local("piqa/piqa.yaml", "piqa_val.jsonl"),
    "arc_easy": Local("arc/arc_easy.yaml", "arc-easy_test.jsonl", "test", ASKED),
    "arc_challenge": Local("arc/arc_challenge.yaml", "arc-challenge_test.jsonl", "test", ASKED),
    "lambada_openai": Local(
        "lambada/lambada_openai.yaml",
        "lambada_openai_test.jsonl",
        "test",
        (
            ("doc_to_text", "{{query}}"),
            ("doc_to_target", "{{' ' + answers_text[0]}}"),
            ("doc_to_decontamination_query", "{{query}}"),
        ),
    ),
}
MMLU = "mmlu"
MMLU_FILES = {"test": "mmlu_test.jsonl", "dev": "mmlu_dev.jsonl"}


@dataclass(frozen=True)
class TaskScore:
    """A score of a task.

    Attributes:
        task: its name; for MMLU the group, such as `mmlu_stem`, or `mmlu` for all of it.
        metric: "acc", "acc_norm" (by the answers' lengths) or "perplexity".
        shots: examples in the prompt.
        value: the score; the standard error is over items.
        chance: accuracy of guessing; None for perplexity.
    """

    task: str
    metric: str
    shots: int
    value: Mean
    chance: float | None

    @property
    def near_chance(self) -> bool:
        """True if the score is not above guessing by two standard errors."""
        return self.chance is not None and not self.value.is_above(self.chance)

    @property
    def below_chance(self) -> bool:
        """True if the score is below guessing by more than two standard errors."""
        return self.chance is not None and self.value.is_below(self.chance)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    work: Path,
    shots: int = 0,
    batch: int = 8,
    limit: int | None = None,
) -> list[TaskScore]:
    """Run tasks on a causal language model.

    Args:
        model: of Transformers, on its device.
        tokenizer: the model's, of Transformers.
        tasks: names of the harness: those of `LOCAL` and "mmlu" with a folder, any without.
        folder: of JSON lines; None reads from the hub.
        work: an existing folder for the configurations that are written for local files.
        shots: examples in the prompt; local files have them for MMLU alone.
        batch: sequences at a time.
        limit: only the first items of each task (of each subject of MMLU); None: all.

    Raises:
        ModuleNotFoundError: without lm-eval.
        ValueError: if a task is not known, its file is missing, or it has no examples.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Reading the harness's own thousands of configurations takes seconds.
    manager = TaskManager(include_defaults=folder is None)
    if folder is None:
        _check_names(tasks, manager.all_tasks)
    specs = list(tasks) if folder is None else local_tasks(tasks, folder, work, shots)
    model.eval()
    language = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch,
        max_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        trust_remote_code=False,
    )
    found = simple_evaluate(
        model=language,
        tasks=specs,
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=0,
        task_manager=manager,
    )
    assert found is not None  # it is None on ranks above the first alone
    samples: dict[str, list[Sample]] = found["samples"]
    scores = []
    for name, items in grouped(samples).items():
        scores += scores_of(name, items, shots)
    return scores


def local_tasks(tasks: Sequence[str], folder: Path, work: Path, shots: int = 0) -> list[str]:
    """Check the items, write a configuration per task (per subject for MMLU), return the paths."""
    harness = Path(_harness()) / "tasks"
    written: list[str] = []
    for task in tasks:
        if task not in (*LOCAL, MMLU):
            raise ValueError(
                f"a local task must be one of {[*LOCAL, MMLU]}, got {task!r}"
                f"{did_you_mean(task, [*LOCAL, MMLU])}"
            )
        if shots and task != MMLU:
            raise ValueError(f"`shots` must be 0 for the local task {task}, got {shots}")
        if task == MMLU:
            written += _mmlu(harness, folder, work, shots)
            continue
        local = LOCAL[task]
        file = folder / local.file
        for _ in read_items(file, task):
            pass
        content = {
            "include": str(harness / local.config),
            "task": task,
            **_dataset({local.split: file}),
            "training_split": None,
            **dict(local.changes),
        }
        if local.split == "test":
            content["validation_split"] = None
        written.append(_write(work / f"{task}.yaml", content))
    return written


def grouped(samples: Mapping[str, list[Sample]]) -> dict[str, list[Sample]]:
    """Items by task; MMLU's subjects by their groups, and all of them together."""
    groups = _mmlu_groups() if any(name.startswith(f"{MMLU}_") for name in samples) else {}
    found: dict[str, list[Sample]] = {}
    for name, items in samples.items():
        group = groups.get(name)
        for key in (name,) if group is None else (group, MMLU):
            found.setdefault(key, []).extend(items)
    return found


def scores_of(name: str, items: Sequence[Sample], shots: int) -> list[TaskScore]:
    """Every metric that the items have."""
    scores = []
    # A question with n answers has n requests.
    chance = sum(1 / len(item["arguments"]) for item in items) / len(items)
    for metric in METRICS:
        if metric not in items[0]:
            continue
        if metric == "perplexity":  # of the last word; items hold its log-likelihood
            logs = Mean.of(torch.tensor([float(item[metric]) for item in items]))
            value = math.exp(-logs.mean)
            score = Mean(value, value * logs.error, logs.items)
            scores.append(TaskScore(name, metric, shots, score, None))
        else:
            values = torch.tensor([float(item[metric]) for item in items])
            guess = chance if len(items[0]["arguments"]) > 1 else 0.0
            scores.append(TaskScore(name, metric, shots, Mean.of(values), guess))
    return scores


def _mmlu(harness: Path, folder: Path, work: Path, shots: int) -> list[str]:
    by_subject: dict[str, dict[str, list[str]]] = {}
    for split, file in MMLU_FILES.items():
        for line, item in read_items(folder / file, MMLU):
            subject = item["subject"]
            config = harness / MMLU / "default" / f"{MMLU}_{subject}.yaml"
            if not re.fullmatch("[a-z_]+", subject) or not config.is_file():
                raise ValueError(
                    f"{folder / file}: `subject` must be one of MMLU's, got {subject[:80]!r}"
                )
            by_subject.setdefault(subject, {}).setdefault(split, []).append(line)
    written = []
    for subject, splits in sorted(by_subject.items()):
        given = len(splits.get("dev", ()))
        if shots > given:
            raise ValueError(
                f"`shots` must be at most the {given} examples of {MMLU}'s {subject}, got {shots}"
            )
        files = {}
        for split, lines in splits.items():
            files[split] = work / f"{MMLU}_{subject}_{split}.jsonl"
            files[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
        name = f"{MMLU}_{subject}"
        content = {
            "include": str(harness / "mmlu" / "default" / f"{name}.yaml"),
            "task": name,
            **_dataset(files),
        }
        written.append(_write(work / f"{name}.yaml", content))
    return written


def _mmlu_groups() -> dict[str, str]:
    """Group of each subject, such as `mmlu_stem`, from the harness's configurations."""
    groups = {}
    for path in (Path(_harness()) / "tasks" / MMLU / "default").glob(f"{MMLU}_*.yaml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith('"tag"'):
                groups[path.stem] = line.split(":")[1].strip().strip('"').removesuffix("_tasks")
    return groups


def _dataset(files: Mapping[str, Path]) -> dict[str, Any]:
    data = {split: str(path.resolve()) for split, path in files.items()}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data}}


def _harness() -> str:
    import lm_eval

    return str(Path(lm_eval.__file__).parent)


def _check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            raise ValueError(
                f"`--tasks` must name tasks of the lm-evaluation-harness, got {task!r}"
                f"{did_you_mean(task, known)}"
            )


def _write(path: Path, content: Mapping[str, Any]) -> str:
    # JSON is YAML.
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return str(path)
