"""Change an optional package as soon as it is imported, without importing it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(package: str, follower: str) -> None:
    """Import the module `follower` once `package` has been imported; now if it has been.

    Never imports `package`: it may be slow, or broken in an installation that does without it.
    """
    if package in sys.modules:
        importlib.import_module(follower)
    else:
        sys.meta_path.insert(0, _Finder(package, follower))


def replace_everywhere(name: str, owner: Any, function: Any) -> None:
    """Replace a function in the module that has it, and in all that imported it from there.

    Args:
        name: of the function.
        owner: the module.
        function: takes its place.
    """
    replaced = getattr(owner, name)
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            for alias, value in list(vars(module).items()):
                if value is replaced:
                    setattr(module, alias, function)


class _Finder(MetaPathFinder):
    """Finds one package where the other finders do, and has the follower imported behind it."""

    def __init__(self, package: str, follower: str) -> None:
        self.package = package
        self.follower = follower
        self.is_asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package or self.is_asking:
            return None
        self.is_asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_asking = False
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(self.follower)
                sys.meta_path.remove(self)

            loader.exec_module = exec_module
        return spec
