"""A direct launch hands the driver what Triton hands it, and encodes each descriptor once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends.nvidia import driver

from spattention.compat import triton as direct
from spattention.compat.triton import DirectLaunch, direct_launch

pytestmark = pytest.mark.skipif(
    not direct.is_known(), reason="internals of this Triton are unknown"
)
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 64], "fp4_padded": False}


class Descriptor:
    """What Triton reads of a tensor descriptor, and the `box` of ours."""

    padding = "zero"
    round_f32_to_tf32 = False
    block_shape = (1, 64)

    def __init__(self, base: torch.Tensor, box: str = "box") -> None:
        self.base, self.box = base, box
        self.shape, self.strides = list(base.shape), list(base.stride())


class Machine:
    """A driver that records launches and encoded tensor maps."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.maps: list[int] = []
        self.utils = SimpleNamespace(
            launch=lambda *given: self.launched.append(given),
            fill_tma_descriptor=self.fill,
            fill_tma_descriptor_tiled=self.fill,
        )

    def fill(self, pointer: int, *rest: Any) -> str:
        self.maps.append(pointer)
        return f"map of {pointer}"

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77

    def allocate_default_profile_scratch(self, size: int, align: int, stream: int) -> None:
        assert size == 0


class Kernel:
    """A compiled kernel of two descriptors, a tuple and an integer, launched as Triton does."""

    function, packed_metadata = "function", ("packed",)

    def __init__(self, machine: Machine) -> None:
        signature = {
            "query": "tensordesc<bf16[1, 64]>",
            "stats": ("*fp32", "i32"),
            "key": "tensordesc<bf16[1, 64]>",
            "count": "i32",
        }
        self.metadata = SimpleNamespace(
            tensordesc_meta=[META, META | {"swizzle": 1}],
            num_ctas=1,
            global_scratch_size=0,
            global_scratch_align=1,
            profile_scratch_size=0,
            profile_scratch_align=1,
            launch_cooperative_grid=False,
            launch_pdl=True,
        )
        self.run = driver.CudaLauncher.__new__(driver.CudaLauncher)
        vars(self.run).update(vars(self.metadata), gsan_enabled=False)
        self.run.arg_annotations = self.run.kernel_signature = None
        self.run.launch = driver.wrap_handle_tensordesc(
            machine.utils.launch, signature, self.metadata.tensordesc_meta
        )

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        hook = triton.knobs.runtime.launch_enter_hook
        given = (*grid, 77, self.function, self.packed_metadata, None)
        return lambda *arguments: self.run(*given, hook, hook, *arguments)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(triton.runtime.driver, "_active", found, raising=False)
    with mock.patch.object(type(triton.runtime.driver), "active", found):
        yield found


def flat(launched: tuple[Any, ...]) -> list[Any]:
    """Arguments of a launch; hooks without entries count as none."""
    hook = triton.knobs.runtime.launch_enter_hook
    found = [None if each is hook else each for each in launched]
    return [*found[:-1], *found[-1]] if isinstance(found[-1], (list, tuple)) else found


def test_driver_gets_what_triton_hands_it(machine: Machine) -> None:
    kernel = Kernel(machine)
    arguments = (
        Descriptor(torch.zeros(4, 64)),
        (torch.zeros(3), 3),
        Descriptor(torch.zeros(8, 64)),
        5,
    )
    launch = direct_launch(kernel, arguments)
    assert isinstance(launch, DirectLaunch)
    kernel[(9, 1, 1)](*arguments)
    launch(9, *arguments)
    wanted, found = (flat(each) for each in machine.launched)
    assert len(found) == len(wanted) > 12
    assert all(a is b or a == b for a, b in zip(found, wanted))


def test_descriptors_are_encoded_once(machine: Machine) -> None:
    """Another address, or another box at the same one, is another descriptor."""
    one, other = torch.zeros(4, 64), torch.zeros(4, 64)
    first = (Descriptor(one), (other, 3), Descriptor(other), 5)
    launch = direct_launch(Kernel(machine), first)
    launch(1, *first)
    launch(1, *first)
    assert sorted(machine.maps) == sorted([one.data_ptr(), other.data_ptr()])
    launch(1, Descriptor(one, "another"), (other, 3), Descriptor(one), 5)
    assert machine.maps[2:] == [one.data_ptr()] * 2


def test_hooks_are_called(machine: Machine) -> None:
    kernel = Kernel(machine)
    arguments = (Descriptor(torch.zeros(4, 64)), (0, 3), Descriptor(torch.zeros(4, 64)), 5)
    launch = direct_launch(kernel, arguments)
    hook = triton.knobs.runtime.launch_enter_hook
    calls = [lambda metadata: None]
    with mock.patch.object(hook, "calls", calls):
        launch(1, *arguments)
    assert hook in machine.launched[0]


@pytest.mark.parametrize("change", ["release", "launcher", "descriptors"])
def test_unknown_internals_are_left_to_triton(
    machine: Machine, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(machine)
    arguments: tuple[Any, ...] = (Descriptor(torch.zeros(4, 64)), (0, 3), 4, 5)
    if change != "descriptors":
        arguments = (*arguments[:2], Descriptor(torch.zeros(4, 64)), 5)
    if change == "release":
        monkeypatch.setattr(triton, "__version__", "3.10.0")
    if change == "launcher":
        kernel.run = SimpleNamespace()
    assert not isinstance(direct_launch(kernel, arguments), DirectLaunch)


def test_a_launch_of_unknown_internals_is_not_bound(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is the first launch of a kernel, which Triton makes, nor one that takes memory."""
    arguments = (Descriptor(torch.zeros(4, 64)), (0, 3), Descriptor(torch.zeros(4, 64)), 5)
    kernel = Kernel(machine)

    def bound() -> bool:
        with direct.recorded_launches() as recorded:
            launch(1, *arguments)
        return direct.bind_launches(recorded, lambda tensor: 0) is not None

    with direct.recorded_launches() as recorded:
        launch = direct_launch(kernel, arguments)
    assert recorded == [None]
    assert bound()
    kernel.run.global_scratch_size = 64
    launch = direct_launch(kernel, arguments)
    monkeypatch.setattr(
        triton.runtime._allocation, "_allocator", SimpleNamespace(get=lambda: print)
    )
    assert not bound()
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    kernel.run.global_scratch_size = 0
    launch = direct_launch(kernel, arguments)
    assert not bound()
