"""`spattention fit` from a small dense model to a folder that opens, and what goes wrong."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import spattention as spa
from spattention.cli import main
from spattention.data.token_file import write_token_file
from spattention.data.tokenizer import for_transformers, train_tokenizer
from spattention.data.tokens import TokenStream
from spattention.fitting import Profile
from spattention.fitting.sinks import first_scores
from spattention.hf.config import read_section

PAGE = "It was a dark and stormy night, and the captain said to the crew 0123456789: "
LAYERS, HEADS, CONTEXT = 2, 4, 160
SMALL = ["--context", str(CONTEXT), "--rows", "3", "--check", "2", "--needles", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with text and a saved dense model."""
    folder = tmp_path_factory.mktemp("fit")
    text = "\f".join(f"Chapter {k}. {PAGE * 12}" for k in range(12))
    (folder / "books.txt").write_text(text)
    tokenizer = train_tokenizer(text.split("\f"), 300)
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
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    for_transformers(tokenizer, 256, 0).save_pretrained(folder / "dense")
    return folder


def fit(home, output, *more, model=None, data=("--data", "books.txt")):
    where = [] if not data else [data[0], str(home / data[1])]
    command = ["fit", str(model or home / "dense"), "--output", str(output), *where, *SMALL]
    return main([*command, *more])


def patterns_of(folder):
    spa.hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, read_section(model.config).layer_patterns


def test_a_dense_model_becomes_a_folder_that_opens(home, tmp_path, capsys):
    output = tmp_path / "new" / "bands"
    assert fit(home, output, "--pairs", "0.3") == 0
    assert [path.name for path in output.parent.iterdir()] == ["bands"]
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "tokenizer.json", "profile.json", "profile.png",
        "fit.json", "fit.md", "fit.png",
    }  # fmt: skip
    facts = json.loads((output / "fit.json").read_text())
    printed = " ".join(capsys.readouterr().out.split())
    for share in facts["captured"].values():
        assert 0 < share <= 1
        assert f"{share:.4f}" in printed
    assert "Fitted at 160 tokens: in longer texts, up to 256, only heads" in printed
    assert "`[0, 64)` is the token itself" in (output / "fit.md").read_text()
    assert facts["checked_tokens"] == 2 * CONTEXT
    profile = Profile.load(output / "profile.json")
    assert (profile.tokens, profile.needles) == (3 * CONTEXT, 2)
    model, patterns = patterns_of(output)
    assert list(patterns) == spa.fit(profile, pairs=0.3, span=256, prefix=4)
    assert sum(sum(pattern.pairs(CONTEXT)) for pattern in patterns) == pytest.approx(
        facts["pairs"] * LAYERS * HEADS * CONTEXT * (CONTEXT + 1) / 2
    )
    assert f"{facts['pairs']:.4f} of dense attention's pairs" in (output / "fit.md").read_text()
    dense = AutoModelForCausalLM.from_pretrained(home / "dense")
    for name, weight in dense.named_parameters():
        assert torch.equal(weight, model.get_parameter(name))
    assert AutoTokenizer.from_pretrained(output)(PAGE)["input_ids"]
    assert output.stat().st_mode & 0o777 == 0o755


def test_the_folder_opens_in_a_new_process(home, tmp_path):
    assert fit(home, tmp_path / "bands") == 0
    code = (
        "import sys, torch, spattention as spa\n"
        "from transformers import AutoModelForCausalLM\n"
        "spa.hf.register()\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(model(torch.arange(1, 40)[None]).logits.shape, model.config._attn_implementation)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bands")], capture_output=True, text=True
    )
    assert "torch.Size([1, 39, 320]) spattention" in done.stdout, done.stderr


def test_everything_attended_changes_no_loss(home, tmp_path):
    assert fit(home, tmp_path / "bands", "--pairs", "1") == 0
    loss = json.loads((tmp_path / "bands" / "fit.json").read_text())["loss"]
    assert loss["bands"] == pytest.approx(loss["dense"], abs=1e-5)


def test_a_given_profile_is_used(home, tmp_path):
    assert fit(home, tmp_path / "first") == 0
    given = tmp_path / "first" / "profile.json"
    more = ["--profile", str(given), "--share", "--dense-layers", "1", "--pairs", "0.7"]
    assert fit(home, tmp_path / "second", *more) == 0
    profile = Profile.load(given)
    assert Profile.load(tmp_path / "second" / "profile.json") == profile
    _, patterns = patterns_of(tmp_path / "second")
    assert patterns[1].intervals == (((0, 256),),) * HEADS
    assert patterns[0].intervals[::2] == patterns[0].intervals[1::2]


def test_no_sensitivity_ignores_that_of_a_profile(home, tmp_path):
    assert fit(home, tmp_path / "first", "--sensitivity", "2") == 0
    given = tmp_path / "first" / "profile.json"
    assert Profile.load(given).sensitivity is not None
    assert fit(home, tmp_path / "second", "--profile", str(given), "--sensitivity", "0") == 0
    assert Profile.load(tmp_path / "second" / "profile.json").sensitivity is None


def test_sinks_start_from_what_was_measured(home, tmp_path):
    assert fit(home, tmp_path / "bands", "--sinks", "--prefix", "0", "--pairs", "0.2") == 0
    model, patterns = patterns_of(tmp_path / "bands")
    starts = first_scores(Profile.load(tmp_path / "bands" / "profile.json"))
    for layer, pattern in enumerate(patterns):
        sinks = model.model.layers[layer].self_attn.sinks
        for head, intervals in enumerate(pattern.intervals):
            expected = float(starts[layer, head]) - 10 * (intervals == ((0, 256),))
            assert sinks[head].item() == pytest.approx(expected, abs=1e-5)


def test_packed_tokens_of_the_model_are_data(home, tmp_path):
    tokens = np.random.default_rng(0).integers(1, 300, 5 * CONTEXT).astype(np.uint16)
    write_token_file(tmp_path / "a.u16.xz", TokenStream.from_documents([tokens]), 0)
    command = ["fit", str(home / "dense"), "--output", str(tmp_path / "out"), *SMALL]
    assert main([*command, "--data", str(tmp_path / "a.u16.xz"), "--needles", "0"]) == 0
    profile = Profile.load(tmp_path / "out" / "profile.json")
    assert profile.needle is None
    assert profile.rows == 3


def test_data_of_another_tokenizer_is_refused(home, tmp_path, capsys):
    """Data prepared with another tokenizer is refused."""
    prepared = tmp_path / "prepared"
    arguments = ["--output", str(prepared), "--vocabulary", "280", "--held-out", "0"]
    assert main(["prepare", str(home / "books.txt"), *arguments]) == 0
    command = ["fit", str(home / "dense"), "--output", str(tmp_path / "out"), *SMALL]
    assert main([*command, "--data", str(prepared)]) == 2
    assert "must be prepared with the model's tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--pairs", "0"], "`--pairs` must be above 0 and at most 1, got 0.0"),
        (["--pairs", "0.001"], "`pairs` must be at least 0.06"),
        (["--retrieval", "1.1"], "`--retrieval` must be from 0 to 1, got 1.1"),
        (["--retrieval", "nan"], "`--retrieval` must be from 0 to 1, got nan"),
        (["--pairs", "nan"], "`--pairs` must be above 0 and at most 1, got nan"),
        (["--context", "300"], "`--context` must be at most the model's 256, got 300"),
        (["--rows", "0"], "`--rows` must be from 1 to 2147483647, got 0"),
        (["--rows", "9999"], "`--data` must hold at least 1600160 tokens"),
        (["--needles", "-1"], "`--needles` must be from 0 to"),
        (["--local", "161"], "`local` must be at least 1 and at most 160"),
        (["--dense-layers", "2"], "must be distinct indices from 0 to 1, got [2]"),
        (["--dense-layers", "0", "1"], "at least 1.0 at length 160 for 2 of 2 layers dense"),
        (["--span", "100"], "`span` must be at least 160"),
        (["--prefix", "17"], "`--prefix` must be at most 16"),
        (["--profile", "nowhere.json"], "nowhere.json must be a profile, there is no such file"),
        (["--data", "nowhere.txt"], "nowhere.txt is neither a file nor a folder"),
        (["--data", "nowhere.u16.xz"], "nowhere.u16.xz is neither a file nor a folder"),
    ],
)
def test_one_line_names_what_is_wrong(home, tmp_path, more, error, capsys):
    assert fit(home, tmp_path / "deep" / "out", *more) == 2
    said = capsys.readouterr().err.splitlines()
    assert error in said[-1]
    assert said[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == [], "nothing half converted is left behind"


@pytest.mark.parametrize("more", [["--pairs", "0.001"], ["--span", "100"], ["--dense-layers", "0"]])
def test_nothing_is_measured_for_a_wrong_budget(home, tmp_path, more, monkeypatch):
    command = import_module("spattention.cli.fit")
    monkeypatch.setattr(command.hf, "profile", lambda *_, **__: pytest.fail("it was measured"))
    assert fit(home, tmp_path / "out", *more) == 2


def test_models_that_are_no_dense_models_are_named(home, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"')
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    code = {"auto_map": {"AutoModelForCausalLM": "m.M"}, "model_type": "mine"}
    (foreign / "config.json").write_text(json.dumps(code))
    assert fit(home, tmp_path / "bands") == 0
    capsys.readouterr()
    for model, error in (
        (tmp_path / "file", "must be a folder with a config.json"),
        (tmp_path / "empty", "must be a folder with a config.json"),
        (adapter, "must hold a whole model, got an adapter (adapter_config.json)"),
        (broken, "`MODEL` must be a saved causal language model"),
        (foreign, "`MODEL` must be a saved causal language model"),
        (tmp_path / "bands", "`MODEL` must be dense"),
    ):
        assert fit(home, tmp_path / "out", model=model) == 2
        said = capsys.readouterr().err.splitlines()
        assert error in said[-1]
        assert str(model) in said[-1]
        assert not (tmp_path / "out").exists()


def test_a_profile_of_another_model_is_refused(home, tmp_path, capsys):
    sys.path.insert(0, os.path.dirname(__file__))
    attending = import_module("attending")
    attending.profile_of(attending.random_weights(2, 8, 20, 0, 1.0)).save(tmp_path / "p.json")
    assert fit(home, tmp_path / "out", "--profile", str(tmp_path / "p.json")) == 2
    assert "it has heads = 8 (profile of made by hand)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_output_stays_as_it_is(home, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert fit(home, tmp_path / "out") == 2
    assert "`--output` must not exist" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_fit_leaves_nothing(home, tmp_path, monkeypatch, error):
    command = import_module("spattention.cli.fit")

    def stop(folder, *rest):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(command, "_save", stop)
    assert fit(home, tmp_path / "deep" / "out") in (130, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_fit_that_is_killed_leaves_nothing(home, tmp_path, monkeypatch):
    """SIGTERM, which schedulers send, in the middle of the work."""
    command = import_module("spattention.cli.fit")

    def stop(folder, *rest):
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command, "_save", stop)
    with pytest.raises(SystemExit) as error:
        fit(home, tmp_path / "deep" / "out")
    assert error.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
