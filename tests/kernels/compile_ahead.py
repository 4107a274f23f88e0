"""Compile every Triton kernel of a call for a GPU that is not there.

    TRITON_INTERPRET=0 python tests/kernels/compile_ahead.py 90 MODULE:FUNCTION

FUNCTION takes no arguments and calls operations with ``impl="triton"`` on CPU tensors. Kernels are compiled to machine code
for compute capability 9.0 and not launched; one line of JSON per kernel says its name, and the shared memory it wants.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks"), str(HERE.parents[1])]

LIMITS = {80: 163 * 1024, 90: 227 * 1024}


class _Driver:
    """Just enough of a driver to be asked what to compile for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def main() -> None:
    capability, place = int(sys.argv[1]), sys.argv[2]
    import triton
    from triton.runtime.jit import JITFunction

    from workbench.kernels import forms

    assert not triton.knobs.runtime.interpret, "set TRITON_INTERPRET=0: interpreted kernels cannot be compiled"
    triton.runtime.driver.set_active(_Driver(capability))
    forms.why_not_triton = lambda tensors: ""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        shared = kernel.metadata.shared
        assert shared <= LIMITS[capability], f"{self.__name__} wants {shared} bytes of shared memory"
        assert len(kernel.asm["cubin"]) > 0
        print(json.dumps({"kernel": self.__name__, "shared": shared}), flush=True)
        return kernel

    JITFunction.run = compile_only
    module, function = place.split(":")
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
