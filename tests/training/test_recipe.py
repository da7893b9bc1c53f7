"""Recipes: what a file says, what changes it, and what is refused by name."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from spattention.training.bounds import BOUNDS
from spattention.training.recipe import Recipe, read_recipe, recipe_from

RECIPES = Path(__file__).parents[2] / "recipes"
LEAST = {
    "model": "olmoe-tiny",
    "data": "a.u16.xz",
    "context": 64,
    "steps": 10,
    "batch": 4,
    "learning_rate": 1e-3,
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_reads(path):
    recipe = read_recipe(path)
    assert recipe.passes(1) * recipe.micro_batch == recipe.batch
    assert recipe == recipe_from(recipe.to_dict() | {"data": list(recipe.data)})


def test_changes_are_toml_or_bare_text(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('model = "olmoe-tiny"\ncontext = 64\nsteps = 5\nbatch = 2\n')
    changes = ("data=x.u16.xz", "learning_rate=1", 'attention=["dense", "exclusive"]', "sinks=true")
    recipe = read_recipe(file, (*changes, "steps=7"))
    assert recipe.data == ("x.u16.xz",)
    assert recipe.learning_rate == 1.0
    assert recipe.attention == ("dense", "exclusive")
    assert recipe.sinks
    assert recipe.steps == 7
    assert read_recipe(file, ("data=x", "learning_rate=1", "attention=dense")).attention == "dense"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"stepz": 1}, r"a recipe has no field 'stepz', did you mean `steps`\?"),
        ({"steps": 0}, r"`steps` must be in \[1, 1,000,000,000\], got 0"),
        ({"steps": int("9" * 40)}, r"`steps` must be in \[1, 1,000,000,000\], got 9999"),
        ({"steps": 1.5}, "`steps` must be int, got 1.5"),
        ({"steps": True}, "`steps` must be int, got True"),
        ({"layers": 1_000_000}, r"`layers` must be in \[1, 1,024\], got 1000000"),
        ({"vocabulary": 10**9}, r"`vocabulary` must be in \[1, 1,048,576\], got 1000000000"),
        ({"context": 1}, r"`context` must be in \[2, 16,777,216\], got 1"),
        ({"threads": 1_000_000}, r"`threads` must be in \[0, 1,024\], got 1000000"),
        ({"workers": 100_000}, r"`workers` must be in \[0, 128\], got 100000"),
        ({"learning_rate": "high"}, "`learning_rate` must be float, got 'high'"),
        ({"learning_rate": float("inf")}, r"`learning_rate` must be in \(0, 10\], got inf"),
        ({"learning_rate": float("nan")}, r"`learning_rate` must be in \(0, 10\], got nan"),
        ({"learning_rate": 10**400}, r"`learning_rate` must be in \(0, 10\], got 1000"),
        ({"beta1": 1.0}, r"`beta1` must be in \[0, 1\), got 1.0"),
        ({"z_loss": -1.0}, r"`z_loss` must be in \[0, 1,000\], got -1.0"),
        ({"divergence": float("nan")}, r"`divergence` must be in \[0, 1,000\], got nan"),
        ({"data": [[]] * 10_000}, r"`data` must be .*, got .{70,90}$"),
        ({"precision": "float16"}, "`precision` must be .*, got 'float16'"),
        ({"data": [1]}, r"`data` must be .*, got \[1\]"),
        ({"learning_rat": 1.0}, r"no field 'learning_rat', did you mean `learning_rate`\?"),
        ({"micro_batches": 3}, r"no field 'micro_batches', did you mean `micro_batch`\?"),
        ({"qqq": 3}, "a recipe has no field 'qqq', it has across_documents, attention, "),
        ({"micro_batch": 3}, "`micro_batch` must divide the batch of 4, got 3"),
        ({"seed": 2**32}, r"`seed` must be in \[0, 4,294,967,295\], got 4294967296"),
    ],
)
def test_what_is_refused(change, error):
    with pytest.raises(ValueError, match=error):
        recipe_from(LEAST | change)


def test_missing_fields_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"must have the fields \['model', 'context'\]"):
        recipe_from({k: v for k, v in LEAST.items() if k not in ("model", "context")})
    with pytest.raises(ValueError, match="must be a recipe in TOML"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = \n")
    with pytest.raises(ValueError, match="must be a recipe in TOML"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ValueError, match="`--set` takes NAME=VALUE, got 'steps'"):
        read_recipe(tmp_path / "empty.toml", ["steps"])


def test_every_number_of_a_recipe_has_bounds():
    """And the page on training has their table."""
    page = (RECIPES.parent / "docs" / "training.md").read_text()
    for field in fields(Recipe):
        if field.type in ("int", "int | None", "float"):
            assert f"| `{field.name}` | {BOUNDS[field.name]} |" in page


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"a = " + b"[" * 100_000, "must be a recipe in TOML"),
        (b"a = " + b"[" * 100_000 + b"]" * 100_000, "must be a recipe in TOML"),
        (b"steps = " + b"9" * 5000, "must be a recipe in TOML"),
        (b"\xff\xfe", "must be a recipe in TOML"),
        (b"PK\x03\x04", "must be a recipe in TOML"),
        (b"#" * (2**20 + 1), "must be a recipe of at most 1048576 bytes, got 1048577"),
        (b"[model]\nname = 'x'", r"must have the fields \['data', 'context'"),
    ],
)
def test_foreign_files_are_no_recipes(tmp_path, content, error):
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(ValueError, match=error):
        read_recipe(tmp_path / "r.toml")


def test_recipes_that_cannot_be_read(open_folder, unprivileged):
    with pytest.raises(ValueError, match="must be a recipe in TOML: it is no file"):
        read_recipe(open_folder)
    (open_folder / "r.toml").write_text("steps = 1")
    (open_folder / "r.toml").chmod(0)
    with unprivileged(), pytest.raises(ValueError, match=r"r\.toml .* Permission denied"):
        read_recipe(open_folder / "r.toml")


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000, "1\nseed = 2"])
def test_changes_of_any_form_are_refused_by_field(tmp_path, value):
    """Deep, long, or with a second entry behind a line's end, which was left out in silence."""
    (tmp_path / "r.toml").write_text("".join(f"{k} = {v!r}\n" for k, v in LEAST.items()))
    with pytest.raises(ValueError, match=r"`steps` must be int, got .{,90}$"):
        read_recipe(tmp_path / "r.toml", [f"steps={value}"])


def test_reading_a_recipe_imports_nothing_heavy():
    """The command's help is made from its fields, and must not wait for Transformers."""
    code = (
        "import sys; from spattention.training.recipe import read_recipe\n"
        "print([name for name in ('transformers', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_passes_need_a_multiple():
    recipe = recipe_from(LEAST | {"micro_batch": 2})
    assert recipe.passes(2) == 1
    with pytest.raises(ValueError, match="must be a multiple of micro_batch x devices = 2 x 3"):
        recipe.passes(3)


def test_what_may_change_when_a_run_goes_on():
    recipe = recipe_from(LEAST)
    free = recipe_from(LEAST | {"micro_batch": 2, "workers": 1, "keep": 5, "data": "elsewhere"})
    assert free.differences(recipe.to_dict()) == []
    other = recipe_from(LEAST | {"batch": 8, "seed": 1})
    assert isinstance(other, Recipe)
    assert other.differences(recipe.to_dict()) == ["batch was 4, now 8", "seed was 0, now 1"]
