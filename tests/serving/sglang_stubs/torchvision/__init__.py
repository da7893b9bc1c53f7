"""In place of torchvision, which only models with pictures call."""

from sgl_kernel import absent

__version__ = "0.28.0"
__path__: list[str] = []
__getattr__ = absent
