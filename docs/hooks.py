"""Results that pages link to lie outside `docs/`, where GitHub finds them; they join the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results"
LOG = "benchmarks/LOG.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the results' files to those of the site."""
    for path in sorted((Path(config.config_file_path).parent / RESULTS).iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    root = Path(config.config_file_path).parent
    files.append(File.generated(config, "results/LOG.md", abs_src_path=str(root / LOG)))
    return files


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Point links at them."""
    return markdown.replace(f"](../{RESULTS}/", "](results/").replace(
        f"](../{LOG}", "](results/LOG.md"
    )
