"""What a trace of decoding steps is counted as."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import vllm_profile


def test_overlapping_kernels_are_busy_once() -> None:
    """Time of each kernel, and of the GPU where kernels of two streams overlap."""

    def event(name: str, begin: float, duration: float, kind: str = "kernel") -> dict[str, Any]:
        return {"name": name, "ts": begin, "dur": duration, "cat": kind, "args": {"stream": 7}}

    events = [event("host", 0, 900, "cpu_op")]
    for begin in range(0, 100 * vllm_profile.STEPS, 100):
        events += [event("b", begin + 20, 20), event("a", begin, 10), event("c", begin + 30, 20)]
    found = vllm_profile.of_kernels(events)
    assert found["gpu_busy_a_step"] == pytest.approx(40)
    assert found["launches_a_step"] == 3
    assert found["first_kernel_every"] == 100
    assert sorted(found["kernels"]) == [["a", 10, 1], ["b", 20, 1], ["c", 20, 1]]
    assert [name for name, *_ in found["one_step"]] == ["a", "b", "c"]
    assert vllm_profile.of_kernels(events[:1]) == {}


def test_timed_parts_are_put_back() -> None:
    """The engine's own functions again after the profile."""

    class Owner:
        calls = 0

        def schedule(self) -> None:
            self.calls += 1

    class Core:
        pass

    core: Any = Core()
    core.scheduler = core.model_executor = owner = Owner()
    for owned in ("kv_cache_manager", "driver_worker"):
        setattr(owner, owned, Core())
    owner.driver_worker.worker = Core()  # type: ignore[attr-defined]
    owner.driver_worker.worker.model_runner = Core()  # type: ignore[attr-defined]
    engine: Any = Core()
    engine.engine_core = Core()
    engine.engine_core.engine_core = core
    seconds = vllm_profile.defaultdict[str, float](float)
    with vllm_profile.timed_parts(engine, seconds):
        owner.schedule()
    assert owner.calls == 1
    assert seconds["Owner.schedule"] > 0
    assert "schedule" not in vars(owner)
