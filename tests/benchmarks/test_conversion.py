"""The benchmark of conversions at tiny size: its rows, its measurements, and how it continues."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

import spattention as spa
from benchmarks.conversion import choices, flex, inputs, page, speed, train
from benchmarks.conversion.__main__ import Options, main
from benchmarks.conversion.text import order
from spattention.data.token_file import write_token_file
from spattention.data.tokenizer import for_transformers, train_tokenizer
from spattention.data.tokens import TokenStream

ROOT = Path(__file__).parents[2]
PAGE = "It was a dark night. The captain said to the crew 0123456789 VAR magic numbers: "
CONTEXT, LAYERS, HEADS = 96, 3, 4


def tiny(**more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **more,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversion")
    text = "\f".join(f"Chapter {k}. {PAGE * 20}" for k in range(6))
    tokenizer = for_transformers(train_tokenizer(text.split("\f"), 300), 256, 0)
    tokenizer.save_pretrained(folder / "model")
    tiny().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], "<u2")
    for name in ("train_books", "val_books", "val_long"):
        ids.tofile(folder / "text" / f"{name}.u16")
    return folder


def options(home, output, *more):
    sizes = ["--context", str(CONTEXT), "--profile-rows", "2", "--sensitivity-rows", "1"]
    sizes += ["--needles", "2", "--windows", "2", "--passkey-lengths", "96", "--trials", "1"]
    sizes += ["--batch", "2", "--micro-batch", "1", "--pairs", "0.5", "--commit", "abc"]
    places = ["--model", home / "model", "--text", home / "text", "--output", output]
    return [*map(str, places), *sizes, *more]


def run(home, output, *more):
    """What a call prints, in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(tyro.cli(Options, args=options(home, output, *more)))
    return printed.getvalue()


def test_rows_are_measured_and_a_second_call_continues(home, tmp_path):
    output = tmp_path / "found.json"
    parts = ["--parts", "loss", "passkeys", "--attention", "bands"]
    run(home, output, "--rows", "dense", "fitted", "--tokens", "0", *parts)
    first = json.loads(output.read_text())["rows"]
    assert [row["row"] for row in first] == ["dense", "fitted"]
    assert first[1]["pairs"] <= 0.5 < first[0]["pairs"]
    assert all(0 < row["loss"]["books"]["mean"] < 10 for row in first)
    assert list(first[0]["passkeys"]["96"]) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    names = ["dense", "fitted", "window-sinks", "fitted-lora", "fitted-teacher"]
    more = ["--rows", *names, "--tokens", "0", "0.001"]
    run(home, output, *more, *parts)
    rows = json.loads(output.read_text())["rows"]
    assert rows[:2] == first
    assert [(row["row"], row["million_tokens"]) for row in rows[2:]] == [
        ("window-sinks", 0), ("dense", 0.001), ("fitted", 0.001), ("window-sinks", 0.001),
        ("fitted-lora", 0.001), ("fitted-teacher", 0.001),
    ]  # fmt: skip
    assert rows[3]["train"]["steps"] == round(1000 / (2 * CONTEXT))
    assert len(rows[2]["sinks"]) == LAYERS
    patterns = json.loads(output.with_suffix(".patterns.json").read_text())
    assert set(patterns) == {"fitted", "window-sinks", "fitted-lora", "fitted-teacher"}
    assert len(patterns["fitted"]["patterns"]) == LAYERS
    assert set(json.loads(output.read_text())["settings"]["text"]) == {
        "train_books", "val_books", "val_long",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="must be of the same settings"):
        run(home, output, "--rows", "dense", "--seeds", "1", "--rate", "0.1", *parts)
    assert json.loads(output.read_text())["rows"] == rows


def test_a_killed_call_keeps_every_finished_row(home, tmp_path):
    """The file is whole after each row; the next call begins with the row that was cut."""
    output = tmp_path / "found.json"
    more = ["--rows", "dense", "window", "fitted", "--tokens", "0.001", "--parts", "loss"]
    command = [sys.executable, "-m", "benchmarks.conversion", *options(home, output, *more)]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not output.exists() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    rows = json.loads(output.read_text())["rows"]
    assert 1 <= len(rows) < 3
    run(home, output, *more)
    found = json.loads(output.read_text())["rows"]
    assert found[: len(rows)] == rows
    assert [row["row"] for row in found] == ["dense", "window", "fitted"]


def test_rows_before_training_may_be_others(home, tmp_path):
    """`--untrained` with a profile that other calls share."""
    outputs = [tmp_path / "a.json", tmp_path / "b.json"]
    more = ["--tokens", "0", "0.001", "--parts", "loss", "--profile", str(tmp_path / "shared.json")]
    first = run(home, outputs[0], "--rows", "dense", "--untrained", "window", "fitted", *more)
    rows = json.loads(outputs[0].read_text())["rows"]
    assert [(row["row"], row["million_tokens"]) for row in rows] == [
        ("window", 0), ("fitted", 0), ("dense", 0.001),
    ]  # fmt: skip
    again = run(home, outputs[1], "--rows", "fitted", "--untrained", "fitted", *more)
    assert "profiled" in first
    assert "profiled" not in again
    assert json.loads(outputs[1].read_text())["rows"][0]["loss"] == rows[1]["loss"]


PATTERNS = [
    spa.BandPattern.shared_local(HEADS, 256, prefix=3),
    spa.BandPattern((((0, 5), (20, 90)), (), ((0, 256),), ((7, 30),)), 256),
    spa.BandPattern.sliding_window(HEADS, 256, 9, prefix=1),
]


@pytest.mark.parametrize("with_sinks", [False, True])
def test_flex_attends_as_the_bands_do(with_sinks):
    """Whole texts, gradients, and decoding with a cache."""
    sinks = [torch.linspace(-1, 1, HEADS)] * LAYERS if with_sinks else None
    bands, other = tiny().double(), tiny().double()
    spa.hf.apply(bands, PATTERNS, sinks=sinks or False)
    flex.attend(other, PATTERNS, sinks)
    ids = torch.randint(0, 320, (2, 130), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, bands(ids).logits)
    losses = [model(ids, labels=ids).loss for model in (bands, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for name, parameter in bands.named_parameters():
        torch.testing.assert_close(other.get_parameter(name).grad, parameter.grad)
    texts = [
        model.generate(ids[:, :100], max_new_tokens=8, do_sample=False, pad_token_id=0)
        for model in (bands, other)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("bands", [False, True])
def test_compiled_training_is_the_same(bands):
    """All but attention is compiled, and not afterwards."""
    windows = torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(1))
    found = []
    for compiled in (False, True):
        model = tiny()
        if bands:
            spa.hf.apply(model, PATTERNS)
        schedule = train.Schedule(2, 1, 1e-3, 1e-3, 4, compiled)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        facts = train.train(model, windows, 4 * 24, schedule, seed=0, lora=False)
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        assert (made > 0) == compiled
        assert made < 2 * LAYERS
        found.append((facts["losses"], model(windows[:1]).logits))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_is_what_training_approaches(compiled):
    """A dense student of itself has nothing to learn; one with bands comes nearer to it."""
    windows = torch.randint(0, 320, (8, 24), generator=torch.Generator().manual_seed(1))
    schedule = train.Schedule(2, 1, 1e-2, 1e-3, 4, compiled)
    teacher = train.Teacher(tiny(), 1.0)
    kept = [p.clone() for p in teacher.model.parameters()]
    more = {"seed": 0, "lora": False, "teacher": teacher}
    facts = train.train(tiny(), windows, 2 * 24, schedule, **more)
    assert facts["losses"] == [pytest.approx(0, abs=1e-4)]
    model = tiny()
    spa.hf.apply(model, PATTERNS)
    losses = train.train(model, windows, 40 * 2 * 24, schedule, **more)["losses"]
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        own = model.train()(input_ids=windows, labels=windows, use_cache=False)
        logs, taught = (each.log_softmax(-1) for each in (own.logits, tiny()(windows).logits))
    apart = (taught.exp() * (taught - logs)).sum(-1).mean()
    assert apart < 1.1 * losses[-1]
    assert all(map(torch.equal, teacher.model.parameters(), kept))


def test_rounded_models_keep_their_positions():
    model = train.to_bfloat16_weights(tiny())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_loss_is_shared_with_the_teacher():
    windows = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    schedule = train.Schedule(2, 2, 1e-2, 1e-3, 4)
    torch.manual_seed(5)
    other = LlamaForCausalLM(tiny().config).eval()
    first = [
        train.train(
            tiny(), windows, 2 * 24, schedule, seed=0, lora=False,
            teacher=None if share is None else train.Teacher(other, share),
        )["losses"][0]
        for share in (None, 0.0, 0.25, 1.0)
    ]  # fmt: skip
    assert first[1] == first[0]
    assert first[2] == pytest.approx(0.75 * first[0] + 0.25 * first[3], abs=2e-4)


LONG = torch.randint(0, 320, (3, 128), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bands", [False, True])
def test_speed_is_measured_beside_the_cache(bands, monkeypatch):
    monkeypatch.setattr(speed, "TOKENS", 256)
    model = tiny()
    if bands:
        spa.hf.apply(model, PATTERNS)
    found = speed.speed(model, LONG, (32, 128), rows=2)
    assert set(found["prefill"]) == {"32", "128"}
    assert all(each["tokens_per_second"] > 0 for each in found["prefill"].values())
    step = found["decode"]["128"]
    assert (step["rows"], step["tokens"]) == (2, 64)
    dense = LAYERS * 2 * 128 * 2 * 8 * 4  # layers, key/value heads, tokens, key and value, floats
    if not bands:
        assert step["cache_bytes"] == pytest.approx(dense, rel=0.01)
        assert found["prefill"]["128"]["pairs"] == 1.0
        return
    shares = [sum(each.pairs(128)) / (HEADS * 128 * 129 / 2) for each in PATTERNS]
    assert found["prefill"]["128"]["pairs"] == pytest.approx(sum(shares) / LAYERS)
    assert step["cache_bytes"] == pytest.approx(spa_bytes(model), rel=0.01)


@pytest.mark.parametrize("replayed", [False, True])
def test_timers_of_a_gpu_take_the_call(replayed, monkeypatch):
    """Calls on a GPU are timed by functions that no test without one runs."""
    names = ("eager_milliseconds", "graph_milliseconds")
    timers = {name: create_autospec(getattr(speed, name), return_value=1.5) for name in names}
    for name, timer in timers.items():
        monkeypatch.setattr(speed, name, timer)
    found = speed.milliseconds(lambda: None, torch.device("cuda"), replayed=replayed)
    assert found == 1.5
    assert [timers[name].called for name in names] == [not replayed, replayed]


def spa_bytes(model):
    cache = spa.hf.BandCache(model.config)
    with torch.no_grad():
        model(LONG[:1, :4], past_key_values=cache)
    return cache.nbytes


def test_memory_is_that_of_the_cache():
    model = tiny()
    dense = speed.memory(model, LONG, 128)
    assert dense["bytes"] == pytest.approx(LAYERS * 2 * 128 * 2 * 8 * 4, rel=0.01)
    spa.hf.apply(model, PATTERNS)
    bands = speed.memory(model, LONG, 128)
    assert bands["bytes"] == pytest.approx(spa_bytes(model), rel=0.01)
    rows = {
        (name, 0.0): [{"row": name, "seed": 0, "pairs": pairs, "memory": found}]
        for name, pairs, found in (("dense", 1.0, dense), ("bands", 0.4, bands))
    }
    table = page.memories(rows)
    assert "| attention | pairs at 2,048 | pairs at 128 | cache of 128, MB | x |" in table
    assert f"| {dense['bytes'] / bands['bytes']:.1f} |" in table


def test_what_is_wrong_is_not_timed(monkeypatch):
    """Bands that are others than the pattern's, and a cache that lost its keys."""
    model = tiny()
    spa.hf.apply(model, PATTERNS)
    with torch.no_grad():
        assert max(speed.check(model, LONG).values()) < 1e-5
    made = speed._cache

    class Loses:
        def __call__(self, model, length):
            cache = made(model, length)
            for layer in cache.layers:
                layer.update = lambda key, value, *rest, own=layer.update: own(0 * key, value)
            return cache

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(speed, "_cache", Loses())
        with pytest.raises(ValueError, match="`decode` must be within"):
            speed.check(model, LONG)
    other = spa.BandPattern.sliding_window(HEADS, 256, 7)
    right = spa.band_attention
    monkeypatch.setattr(spa, "band_attention", lambda q, k, v, _: right(q, k, v, other))
    with torch.no_grad(), pytest.raises(ValueError, match="`bands` must be within"):
        speed.check(model, LONG)


class Knows:
    """A model that gives each token after an `a` (1) the logits of a certain `b` (2)."""

    device = torch.device("cpu")

    def eval(self):
        return self

    def __call__(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 5)
        logits[..., 2] = (input_ids == 1) * 10.0
        return type("Output", (), {"logits": logits})


def test_likelihoods_are_of_the_last_tokens():
    requests = [([3, 1, 2], 1), ([3, 1, 4], 1), ([0] * 200 + [1, 2, 1, 2], 3), ([1, 2, 3], 2)]
    logs, greedy = choices.likelihoods(Knows(), requests)
    sure = float(torch.tensor([10.0, 0, 0, 0, 0]).log_softmax(0)[0])
    even = float(torch.zeros(5).log_softmax(0)[0])
    expected = [sure, sure - 10, sure + even + sure, sure + even]
    assert logs.tolist() == pytest.approx(expected, abs=1e-5)
    assert greedy.tolist() == [True, False, False, False]


def test_windows_are_used_once_before_any_repeats():
    found = order(10, 25, seed=3).tolist()
    assert sorted(found[:10]) == sorted(found[10:20]) == list(range(10))
    assert found == order(10, 25, seed=3).tolist() != order(10, 25, seed=4).tolist()


def test_the_rate_rises_and_falls_to_nothing():
    shares = [train._share(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert 0 < shares[-1] < 0.01


def test_text_is_tokenized_anew(tmp_path):
    """Documents keep their text, and end with the new tokenizer's separator."""
    words = ["One whale swam. " * 40, "Two ships sailed. " * 40]
    old, new = (train_tokenizer(words, size) for size in (290, 300))
    ids = [np.array([*old.encode(text).ids, 280], np.uint16) for text in words]
    stream = TokenStream.from_documents(ids)
    write_token_file(tmp_path / "a.u16.xz", stream, 280)
    found = inputs.translate(list(inputs.documents(tmp_path / "a.u16.xz", 280)), old, new, 10**6)
    ends = np.flatnonzero(found == inputs.END)
    assert len(ends) == 2
    parts = [part[part != inputs.END] for part in np.split(found, ends + 1)]
    assert [new.decode(part.tolist()) for part in parts] == [*words, ""]
    assert len(inputs.translate([ids[0]], old, new, 7)) == 7


def result(row, tokens, seed, loss, **more):
    return {
        "row": row, "million_tokens": tokens, "seed": seed, "pairs": 0.35, "cache": 0.5,
        "loss": {"wiki": {"mean": loss}, "books": {"mean": loss + 1}}, **more,
    }  # fmt: skip


def test_tables_are_means_over_seeds_beyond_dense(tmp_path):
    rows = [
        result("dense", 0, 0, 3.0, passkeys={"1024": {"0.1": 1.0, "0.3": 0.5}}),
        result("window", 0, 0, 3.9, passkeys={"1024": {"0.1": 0.0, "0.3": 0.5}}),
        *(result("dense", 10, seed, 2.8 + seed / 10) for seed in (0, 1)),
        *(result("window", 10, seed, 2.9 + seed / 20) for seed in (0, 1)),
        result("fitted", 10, 0, 2.81),
        result("other", 10, 7, 2.85),
        result("fitted-lora", 10, 0, 2.6),
        result("dense-lora", 10, 0, 2.7),
    ]
    for name, part in (("a", rows[:3]), ("b", rows[3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": {}, "rows": part}))
    runs = page.read([tmp_path / "a.json", tmp_path / "b.json"])
    text = "x\n<!-- conversion: before -->\nold\n<!-- end -->\ny"
    before = page.MARK.sub(lambda found: page.fill(found, runs), text)
    assert "| window | 0.35 | 0.50 | +0.900 | +0.900 | 0.25 | - |" in before
    assert "old" not in before
    assert page.MARK.sub(lambda found: page.fill(found, runs), before) == before
    after = page.after_training(runs)
    assert "| window | 0.35 | +0.075 (0.035) / +0.075 (0.035) | 2 | - | - |" in after
    assert "| fitted-lora | 0.35 | -0.100 / -0.100 | 1 | - | - |" in after, "against dense adapters"
    assert "| dense-lora | 0.35 | 2.700 / 3.700 | 1 | - | - |" in after
    assert "| dense | 0.35 | 2.850 (0.071) / 3.850 (0.071) | 2 | - | - |" in after
    assert "| fitted | 0.35 | +0.010 / +0.010 | 1 | - | - |" in after, "against the same seed"
    assert "| other | 0.35 | +0.000 / +0.000 | 1 | - | - |" in after, "against the mean"
    with pytest.raises(SystemExit, match="a table must be one of"):
        page.MARK.sub(lambda found: page.fill(found, runs), text.replace("before", "other"))


def test_losses_of_different_texts_are_not_compared(tmp_path):
    texts = [{}, {"text": {"train_books": "0123"}}]
    for name, settings in zip("ab", texts, strict=True):
        rows = [result("dense", 0, 0, 3.0)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": settings, "rows": rows}))
    with pytest.raises(SystemExit, match=r"of one text, \['a.json', 'b.json'\] differ"):
        page.read([tmp_path / "a.json", tmp_path / "b.json"])


def test_a_run_counts_once(tmp_path):
    """The same seed in two files is not two seeds; another part of the run may be elsewhere."""
    parts = [[result("dense", 10, 0, 2.8)], [result("dense", 10, 0, 2.9)]]
    for name, rows in zip("ab", parts, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": {}, "rows": rows}))
    runs = page.read([tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(SystemExit, match=r"loss of dense at 10 M is there with seeds \[0, 0\]"):
        page.after_training(runs)


def test_tables_are_of_one_context(tmp_path):
    """A mark names the length of training; without one it is 2,048 tokens."""
    for name, context, loss in (("a", 2048, 3.5), ("b", 8192, 3.2)):
        rows = [result("dense", 0, 0, 3.0), result("fitted", 0, 0, loss)]
        found = {"settings": {"context": context}, "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    text = (
        "<!-- conversion: before -->\n<!-- end -->\n"
        "<!-- conversion: before at 8192 -->\n<!-- end -->\n"
    )
    short, long = page.fill_all(text, files).split("at 8192")
    assert "+0.500" in short
    assert "+0.200" not in short
    assert "+0.200" in long
    assert "+0.500" not in long


def test_zero_shot_scores_may_be_of_another_file(tmp_path):
    """A run that is trained again for more measurements has its losses in the first file."""
    asked = {"row": "dense", "million_tokens": 10, "seed": 0, "tasks": {"piqa": {"mean": 0.5}}}
    for name, row in (("a", result("dense", 10, 0, 3.0)), ("b", asked)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": {}, "rows": [row]}))
    found = page.after_training(page.read([tmp_path / "a.json", tmp_path / "b.json"]))
    assert "| dense | 0.35 | 3.000 / 4.000 | 1 | - | 50.0 |" in found


def test_few_rows_of_more_tokens_leave_the_others(tmp_path):
    """Two rows that were trained on more tokens get columns; seeds, positions and order stay those
    of the number of tokens that most runs have.
    """
    rows = [result("dense", 10, seed, 3.0) for seed in (0, 1)]
    rows += [result("window", 10, 0, 3.2), result("fitted", 10, 0, 3.1)]
    rows += [result("dense", 30, 0, 2.8), result("fitted", 30, 0, 2.81), result("late", 30, 0, 2.7)]
    (tmp_path / "a.json").write_text(json.dumps({"settings": {}, "rows": rows}))
    lines = page.after_training(page.read([tmp_path / "a.json"])).splitlines()
    assert lines[0] == (
        "| attention | pairs | 10 M: Wikipedia / books | 30 M: Wikipedia / books | seeds at 10 M | "
        "passkeys at 10 M | zero-shot at 10 M |"
    )
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ["dense", "fitted", "window", "late"]
    assert lines[3] == "| fitted | 0.35 | +0.100 / +0.100 | +0.010 / +0.010 | 1 | - | - |"
    assert lines[4] == "| window | 0.35 | +0.200 / +0.200 | - | 1 | - | - |"
    assert lines[5] == "| late | 0.35 | - | -0.100 / -0.100 | 1 | - | - |"


def test_losses_by_position_are_beyond_dense():
    def at(row, seed, parts):
        losses = {"mean": sum(parts) / 2, "edges": [1, 128, 2048], "parts": parts}
        return {
            "row": row, "million_tokens": 10.0, "seed": seed,
            "loss": {"wiki": losses, "books": losses},
        }  # fmt: skip

    rows = [at("dense", 0, [3.0, 2.0]), at("dense", 1, [3.2, 2.2]), at("fitted", 0, [3.1, 2.3])]
    runs = {("dense", 10.0): rows[:2], ("fitted", 10.0): rows[2:]}
    found = page.positions(runs)
    assert "| attention | text | 1 to 127 | 128 to 2,047 |" in found
    assert "| fitted | Wikipedia | +0.100 | +0.300 |" in found


def test_passkeys_stand_by_length_and_depth():
    keys = {"1024": {"0.1": 1.0, "0.9": 0.5}, "2048": {"0.1": 0.0, "0.9": 1.0}}
    other = {"1024": {"0.1": 0.0, "0.9": 0.5}, "2048": {"0.1": 0.0, "0.9": 1.0}}
    rows = [{"seed": seed, "passkeys": found} for seed, found in enumerate((keys, other))]
    found = page.needles({("fitted", 10.0): rows, ("fitted", 3.0): rows, ("window", 0): rows[:1]})
    assert "| attention | M tokens | 1,024 | 2,048 |" in found
    assert "| fitted | 10 | 0.50 0.50 | 0.00 1.00 |" in found
    assert "| window | 0 | 1.00 0.50 | 0.00 1.00 |" in found
    assert "| fitted | 3 | 0.50 0.50 | 0.00 1.00 |" in found


def test_speeds_stand_beside_pairs_and_cache():
    prefill = {"tokens_per_second": 123_456.0, "pairs": 0.35}
    step = {"tokens_per_second": 9_876.0, "rows": 32, "cache_bytes": 65.6e6}
    row = {"row": "fitted", "million_tokens": 0.0, "seed": 0}
    row["speed"] = {"prefill": {"2048": prefill}, "decode": {"8192": step}}
    found = page.speeds({("fitted", 0.0): [row]})
    assert "| fitted | 0.35 | 65.6 | 123,000 | 9,880 |" in found
    assert "32 texts decoded, tokens/s" in found


def test_the_summary_compares_cost_loss_and_speed():
    """Short titles, losses beyond dense's, passkeys of 2,048 tokens, speed in multiples."""
    keys = {"1024": {"0.1": 1.0}, "2048": {"0.1": 0.5, "0.9": 1.0}}

    def timed(rate):
        prefill = {"2048": {"tokens_per_second": 1.0}, "8192": {"tokens_per_second": rate}}
        return {"prefill": prefill, "decode": {"8192": {"tokens_per_second": 3 * rate}}}

    runs = {
        (name, tokens): [result(name, tokens, 0, loss, passkeys=keys)]
        for name, tokens, loss in [
            ("dense", 0, 3.0), ("fitted", 0, 3.1), ("dense", 10.0, 2.0), ("fitted", 10.0, 2.2),
            ("5:1", 10.0, 2.4), ("fitted-shares", 10.0, 2.3),
        ]
    }  # fmt: skip
    runs["dense", 0] += [{"row": "dense", "seed": 0, "speed": timed(2.0)}]
    runs["fitted", 0] += [{"row": "fitted", "seed": 0, "speed": timed(3.0)}]
    dense, fitted, mix = page.summary(runs).splitlines()[2:]
    assert dense.endswith("| +0.000 / +0.000 | 0.75 | +0.000 / +0.000 | 0.75 | 1.0 / 1.0 |")
    assert fitted.startswith("| `fit`, the default | 0.")
    assert fitted.endswith("| +0.100 / +0.100 | 0.75 | +0.200 / +0.200 | 0.75 | 1.5 / 1.5 |")
    assert mix.startswith("| 5 windows : 1 dense layer |")
    assert mix.endswith("| - | - | +0.400 / +0.400 | 0.75 | - |")


def test_scores_of_ruler_need_no_losses(tmp_path):
    scores = {"single": {"mean": 0.98, "error": 0.02, "items": 50}}
    row = {"row": "dense", "million_tokens": 0.0, "seed": 0, "ruler": {"2048": scores}}
    found = {"settings": {"text": {"val_long": "ab"}}, "rows": [row]}
    (tmp_path / "a.json").write_text(json.dumps(found))
    losses = {"settings": {}, "rows": [result("dense", 0, 0, 3.0)]}
    (tmp_path / "b.json").write_text(json.dumps(losses))
    runs = page.read([tmp_path / "a.json", tmp_path / "b.json"])
    assert "| dense | 0 | 2,048 | 50 | 0.98 (0.02) |" in page.ruler(runs)
    assert "+0.000" in page.before_training(runs)


FITTED = sorted((ROOT / "benchmarks" / "results").glob("fitted_*.json"))


@pytest.mark.parametrize("path", FITTED, ids=lambda path: path.stem)
def test_fitted_patterns_are_those_of_the_runs_named(path):
    """Each row of patterns has the pairs, at the context, that the run it names recorded."""
    found = json.loads(path.read_text())
    assert found["runs"].keys() == found["rows"].keys()
    for name, kept in found["rows"].items():
        run = json.loads((path.parent / found["runs"][name]).read_text())
        recorded = [row["pairs"] for row in run["rows"] if row["row"] == name.partition(" at ")[0]]
        length = run["settings"]["context"]
        dicts = kept["patterns"] if isinstance(kept, dict) else kept
        patterns = [spa.BandPattern.from_dict(each) for each in dicts]
        shares = [sum(p.pairs(length)) / p.num_heads for p in patterns]
        share = sum(shares) / len(shares) / (length * (length + 1) / 2)
        assert recorded == pytest.approx([share] * len(recorded), abs=1e-9)
        assert recorded
