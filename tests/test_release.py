"""What a release is made of: one version, its recipes, its addresses, and folders saved before."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import spattention
from spattention.cli import main
from spattention.training.recipe import find_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
RELEASED = sorted((Path(__file__).parent / "released").iterdir())

OPEN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import spattention as spa

folder = sys.argv[1]
expected = json.load(open(f"{folder}/expected.json"))
spa.hf.register()
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.tensor(expected["tokens"])).logits[0, ::7]
torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)
patterns = [spa.BandPattern.from_dict(each) for each in expected["patterns"]]
found = model.config.spattention.layer_patterns
assert list(found) == [patterns[0], None, patterns[1]], found
assert model.config.spattention.sinks
print("the same")
"""


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", RELEASED, ids=lambda path: path.name)
def test_a_released_folder_opens_as_it_was(folder):
    """In a process that calls only what its readme says; the logits are those of then."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "the same", done.stderr


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited[1] == spattention.__version__


def test_recipes_are_found_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "tiny-cpu" in [path.stem for path in shipped_recipes()]
    assert find_recipe("tiny-cpu").read_text().startswith("# A tiny model")
    (tmp_path / "tiny-cpu").write_text("own")  # a file of that name comes first
    assert find_recipe("tiny-cpu") == Path("tiny-cpu")
    for name in ("tiny-gpu", "recipes/tiny-gpu.toml"):
        assert main(["train", name]) == 2
        told = capsys.readouterr().err
        assert f"paper-small, tiny-cpu; {name} is no file, did you mean tiny-cpu?" in told


def test_the_wheel_has_the_recipes():
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert built["targets"]["wheel"]["force-include"] == {"recipes": "spattention/recipes"}
    assert "recipes" in built["targets"]["sdist"]["include"]  # the wheel is made from it


def test_links_of_a_release_work_anywhere(release):
    text = (ROOT / "README.md").read_text()
    found = release.absolute(text, "https://host/own/it", "v1")
    assert "](https://host/own/it/blob/v1/docs/performance.md)" in found
    assert "](https://host/own/it/raw/v1/docs/images/" in found
    links = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', found)
    assert all(re.match("https?:|#", url) for pair in links for url in pair if url)
    assert release.absolute(found, "https://host/own/it", "v1") == found
    for target in re.findall(r'\]\(([^)\s:]+)\)|src="([^":]+)"', text):
        assert (ROOT / "".join(target)).exists(), target


def test_a_release_has_the_tag_of_its_version(release):
    release.check_tag(
        f"v{spattention.__version__}", (ROOT / "src/spattention/__init__.py").read_text()
    )
    with pytest.raises(ValueError, match=r"the tag must be v1\.2\.3, .* got v1\.2\.4"):
        release.check_tag("v1.2.4", '__version__ = "1.2.3"\n')
    project = (ROOT / "pyproject.toml").read_text()
    urls = tomllib.loads(release.with_urls(project, "https://host/own/it"))["project"]["urls"]
    assert urls["Issues"] == "https://host/own/it/issues"
    assert json.dumps(urls).count("arxiv") == 1
