"""Run a notebook's cells in one namespace, without Jupyter, and store what they show.

python tests/examples/notebook.py examples/story.ipynb    # runs, and writes the outputs into it
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
import types
from pathlib import Path
from typing import Any


class Image:
    """What `IPython.display.Image` keeps of a picture."""

    def __init__(self, data: bytes) -> None:
        self.data = data


def run(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of its code cells, run from top to bottom."""
    book = json.loads(path.read_text())
    display = types.ModuleType("IPython.display")
    display.Image = Image
    ipython = types.ModuleType("IPython")
    ipython.version_info, ipython.get_ipython = (9, 0), lambda: None  # matplotlib asks
    before = {name: sys.modules.get(name) for name in ("IPython", "IPython.display")}
    sys.modules |= {"IPython": ipython, "IPython.display": display}
    names: dict[str, Any] = {"__name__": "__main__"}
    sys.path.insert(0, str(path.parent))
    try:
        cells = (cell for cell in book["cells"] if cell["cell_type"] == "code")
        for number, cell in enumerate(cells, 1):
            cell["execution_count"] = number
            cell["outputs"] = _run_cell("".join(cell["source"]), f"cell {number}", names, number)
    finally:
        sys.path.remove(str(path.parent))
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return book


def _run_cell(source: str, name: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        value = None
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if value is not None:
        data = {"text/plain": [repr(value)]}
        if isinstance(value, Image):
            data = {"image/png": base64.b64encode(value.data).decode(), "text/plain": ["<picture>"]}
        outputs.append(
            {"output_type": "execute_result", "execution_count": number, "metadata": {}}
            | {"data": data}
        )
    return outputs


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(json.dumps(run(file), indent=1) + "\n")
