"""Data and a whole run that several modules start from."""

import sys
from pathlib import Path

import pytest

from spattention.training.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parent))
from small_run import recipe, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(recipe(data), folder).finished
    return folder
