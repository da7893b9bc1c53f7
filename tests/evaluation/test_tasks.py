"""Tasks of the lm-evaluation-harness from local files, on a model that knows nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spattention.evaluation.items import FIELDS, read_items
from spattention.evaluation.perplexity import Mean
from spattention.evaluation.tasks import LOCAL, TaskScore, local_tasks, run_tasks, scores_of

ITEMS = {
    "hellaswag": {
        "ind": 1, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "label": "3",
        "endings": ["runs.", "sleeps [title] now.", "eats.", "stands up."],
    },
    "winogrande": {
        "sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve",
        "answer": "2",
    },
    "copa": {
        "premise": "It rained.", "choice1": "The street got wet.", "choice2": "The sun set.",
        "question": "effect", "idx": 0, "label": 0,
    },
    "piqa": {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "eat the lid", "label": 0},
    "arc_easy": {"id": "1", "query": "Question: Is ice cold?\nAnswer:", "gold": 1,
                 "choices": ["no", "yes", "maybe"]},
    "arc_challenge": {"id": "1", "query": "Question: Why?\nAnswer:", "gold": 0,
                      "choices": ["so", "no", "yes", "maybe"]},
    "lambada_openai": {"id": 0, "query": "he opened the", "answers_text": ["door"],
                       "choices": ["door"]},
}  # fmt: skip
# A separator that ends a line for `str.splitlines`, as some questions of MMLU have.
MMLU = {"question": "What is\u20281 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}
SUBJECTS = ("astronomy", "philosophy", "marketing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("items")
    for name, item in ITEMS.items():
        (path / LOCAL[name].file).write_text(f"{json.dumps(item)}\n" * 3)
    for file, count in (("mmlu_test.jsonl", 2), ("mmlu_dev.jsonl", 5)):
        lines = [
            json.dumps({"subject": s, **MMLU}, ensure_ascii=False)
            for s in SUBJECTS
            for _ in range(count)
        ]
        (path / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model_and_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: k for k, letter in enumerate([*letters, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)  # every token as likely as any other
    return model, fast


def test_all_local_tasks_run(folder, model_and_tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the harness is an extra, spattention[eval]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scores = run_tasks(*model_and_tokenizer, [*ITEMS, "mmlu"], folder=folder, work=tmp_path)
    found = {(s.task, s.metric): s for s in scores}
    assert {task for task, _ in found} == {
        *ITEMS, "mmlu", "mmlu_stem", "mmlu_humanities", "mmlu_other"
    }  # fmt: skip
    chances = {"hellaswag": 1 / 4, "winogrande": 1 / 2, "copa": 1 / 2, "piqa": 1 / 2}
    chances |= {"arc_easy": 1 / 3, "arc_challenge": 1 / 4, "mmlu": 1 / 4, "lambada_openai": 0.0}
    for task, chance in chances.items():
        score = found[task, "acc"]
        assert score.chance == pytest.approx(chance)
        assert score.value.items == (6 if task == "mmlu" else 3)
    assert found["lambada_openai", "acc"].near_chance  # nothing right
    # A model to which all tokens are alike prefers the answer of the fewest letters.
    assert found["piqa", "acc"].value.mean == 0.0  # "eat the lid" is shorter than "turn the lid"
    assert found["arc_easy", "acc"].value.mean == 0.0  # "no"
    assert found["arc_challenge", "acc"].value.mean == 1.0  # "so", the first of the shortest
    # " door" has five bytes.
    assert found["lambada_openai", "perplexity"].value.mean == pytest.approx(257**5, rel=1e-3)
    again = run_tasks(
        *model_and_tokenizer, ["mmlu"], folder=folder, work=tmp_path, shots=5, limit=1
    )
    assert {s.shots for s in again} == {5}
    assert next(s for s in again if s.task == "mmlu").value.items == 3


def test_what_is_missing_is_named(folder, tmp_path):
    pytest.importorskip("lm_eval", reason="the harness is an extra, spattention[eval]")
    with pytest.raises(ValueError, match="a local task must be one of"):
        local_tasks(["boolq"], folder, tmp_path)
    with pytest.raises(ValueError, match=r"piqa_val\.jsonl is missing"):
        local_tasks(["piqa"], tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"`shots` must be at most the 5 examples .*, got 9"):
        local_tasks(["mmlu"], folder, tmp_path, shots=9)
    with pytest.raises(ValueError, match="`shots` must be 0 for the local task piqa, got 5"):
        local_tasks(["piqa"], folder, tmp_path, shots=5)


BAD = [
    ("copa", "label", 2, "`label` must be one of [0, 1], got 2"),
    ("copa", "label", "0", "`label` must be one of [0, 1], got '0'"),
    ("copa", "question", "why", "`question` must be one of ['cause', 'effect'], got 'why'"),
    ("copa", "choice1", "", "`choice1` must be a string that is not blank, got ''"),
    ("hellaswag", "label", "4", "`label` must be an index into `endings`, got '4'"),
    ("hellaswag", "endings", ["one"], "`endings` must be a list of at least 2 strings"),
    ("winogrande", "answer", 1, "`answer` must be one of ['1', '2'], got 1"),
    ("winogrande", "sentence", "no gap", "`sentence` must be a string with a `_`"),
    ("piqa", "goal", None, "`goal` must be a string that is not blank, got None"),
    ("arc_easy", "gold", -1, "`gold` must be an index into `choices`, got -1"),
    ("arc_easy", "gold", True, "`gold` must be an index into `choices`, got True"),
    ("lambada_openai", "answers_text", "door", "`answers_text` must be a list of at least 1"),
]


@pytest.mark.parametrize(("task", "field", "value", "error"), BAD)
def test_a_bad_item_is_named_by_line_and_field(task, field, value, error, tmp_path):
    """Such items would end in the harness's KeyError, or be scored wrongly without a word."""
    path = tmp_path / LOCAL[task].file
    lines = [json.dumps(ITEMS[task]), "", json.dumps({**ITEMS[task], field: value})]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 3") as caught:
        list(read_items(path, task))
    assert f"{path}, line 3: {error}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "must hold items of the task piqa, got none"),
        ("[1]", "line 1 must be a JSON object, got list"),
        ("{", "line 1 must be a JSON object"),
        ("[" * 100_000, "line 1 must be a JSON object"),
        ('{"goal": "a"}', r"\['sol1', 'sol2', 'label'\] are missing"),
        (b"\xff", "must be UTF-8 text"),
    ],
)
def test_a_file_without_items_is_refused(content, error, tmp_path):
    path = tmp_path / "piqa_val.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=error):
        list(read_items(path, "piqa"))


def test_every_local_task_has_its_fields():
    assert set(FIELDS) == {*LOCAL, "mmlu"}
    for task, item in {**ITEMS, "mmlu": {"subject": "astronomy", **MMLU}}.items():
        assert set(FIELDS[task]) <= set(item)


@pytest.mark.parametrize("subject", ["../../evil", "no_such_subject", "Astronomy"])
def test_a_subject_outside_mmlu_is_refused(subject, folder, tmp_path):
    """A subject names a file, so that a foreign one must not choose where it is written."""
    pytest.importorskip("lm_eval", reason="the harness is an extra, spattention[eval]")
    for file in ("mmlu_test.jsonl", "mmlu_dev.jsonl"):
        (tmp_path / file).write_text(json.dumps({"subject": subject, **MMLU}))
    (tmp_path / "work").mkdir()
    with pytest.raises(ValueError, match="`subject` must be one of MMLU's, got"):
        local_tasks(["mmlu"], tmp_path, tmp_path / "work")
    assert not any((tmp_path / "work").iterdir())


def test_scores_and_chance():
    items = [{"arguments": [0] * 4, "acc": k < 30} for k in range(100)]
    (score,) = scores_of("task", items, 0)
    assert score.value.mean == pytest.approx(0.3)
    assert score.value.error == pytest.approx(math.sqrt(0.3 * 0.7 / 99), rel=1e-6)
    assert score.near_chance  # 0.25 + 2 x 0.046
    better = TaskScore("task", "acc", 0, Mean(0.35, 0.046, 100), 0.25)
    assert not better.near_chance
    (perplexity,) = scores_of("words", [{"arguments": [0], "perplexity": -2.0}] * 3, 0)
    assert perplexity.value.mean == pytest.approx(math.exp(2.0))
    assert perplexity.chance is None
    assert not perplexity.near_chance
