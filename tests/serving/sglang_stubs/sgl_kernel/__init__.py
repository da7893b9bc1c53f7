"""In place of SGLang's kernels, which are built for GPUs: any name can be imported, none called.

SGLang imports them on every device, and on a CPU without AMX calls PyTorch instead.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.4.10"
__path__: list[str] = []


class Absent:
    def __init__(self, name):
        self.path = name

    def __call__(self, *args, **keywords):
        raise NotImplementedError(f"{self.path} is not there on this machine")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.path}.{name}")


def absent(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent(name)


__getattr__ = absent


class Submodules(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("sgl_kernel", "torchvision") and "." in name:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__getattr__ = absent
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Submodules())
