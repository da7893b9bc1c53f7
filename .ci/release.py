"""Prepare a checkout for a release: the addresses that only the place of the repository decides.

    python .ci/release.py https://host/owner/name v0.1.0

README.md then has absolute links, as a package index needs, to the files of that tag;
pyproject.toml and the site name the repository. The tag must be that of the version in the sources.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.compile(r'^__version__ = "(.+)"$', re.M)
PICTURES = (".png", ".svg")


def absolute(readme: str, repository: str, tag: str) -> str:
    """The README with links and pictures that work anywhere."""

    def address(target: str) -> str:
        if re.match(r"[a-z]+:|#", target):
            return target
        kind = "raw" if target.endswith(PICTURES) else "blob"
        return f"{repository}/{kind}/{tag}/{target}"

    readme = re.sub(r"\]\(([^)\s]+)\)", lambda m: f"]({address(m[1])})", readme)
    return re.sub(r'src="([^"]+)"', lambda m: f'src="{address(m[1])}"', readme)


def with_urls(pyproject: str, repository: str) -> str:
    """pyproject.toml with the repository among its addresses."""
    urls = {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
    }
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    return pyproject.replace("[project.urls]\n", f"[project.urls]\n{lines}", 1)


def check_tag(tag: str, source: str) -> None:
    """Raise ValueError unless the tag is that of the version in the package's `__init__.py`."""
    found = VERSION.search(source)
    version = found[1] if found else None
    if tag != f"v{version}":
        raise ValueError(f"the tag must be v{version}, the version in the sources, got {tag}")


def main(repository: str, tag: str) -> None:
    check_tag(tag, (ROOT / "src/spattention/__init__.py").read_text())
    for name, change in (
        ("README.md", lambda text: absolute(text, repository, tag)),
        ("pyproject.toml", lambda text: with_urls(text, repository)),
        ("mkdocs.yml", lambda text: f"repo_url: {repository}\n{text}"),
    ):
        path = ROOT / name
        path.write_text(change(path.read_text()))


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), sys.argv[2])
