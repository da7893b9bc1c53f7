"""The kernels need Triton; without a GPU they run in its interpreter (`tests/conftest.py`)."""

import pytest

pytest.importorskip("triton")
