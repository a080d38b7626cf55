"""What the Triton launchers launch, recorded without a GPU and compiled ahead of time."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTER = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Launch:
    """One kernel launch: the function, its bound arguments and its options."""

    fn: JITFunction
    arguments: dict
    options: dict

    def source(self, pdl: bool) -> ASTSource:
        """The launch's specialisation as the JIT would make it: alignment and the integer 1 are compile-time facts."""
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(self.fn.params):
            value = self.arguments[param.name]
            fixed = param.do_not_specialize
            if param.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
                signature[param.name] = "constexpr"
                constants[param.name] = pdl if param.name == "PDL" else value
            elif isinstance(value, torch.Tensor):
                signature[param.name] = "*" + POINTER[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[param.name] = "fp32"
            else:
                signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not fixed:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.fn, signature, constants, attributes)

    def specialisation(self) -> list:
        """What the JIT compiles a separate version for: constants, dtypes, alignment, integers that it looks at."""
        facts = []
        for param in self.fn.params:
            value = self.arguments.get(param.name)
            if isinstance(value, torch.Tensor):
                facts.append((value.dtype, value.data_ptr() % 16 == 0))
            elif param.is_constexpr or not isinstance(value, int):
                facts.append(value)
            elif not param.do_not_specialize:
                facts.append((value == 1, value % 16 == 0))
        return facts

    def compile(self, arch: int):
        """Compile it for compute capability ``arch`` (80, 90, 100 or 120)."""
        pdl = arch >= 90 and "PDL" in self.arguments
        options = dict(self.options, **({"launch_pdl": True} if pdl else {}))
        return triton.compile(self.source(pdl), target=GPUTarget("cuda", arch, 32), options=options)

    def resources(self, arch: int) -> dict[str, int]:
        """What the kernel takes: registers per thread (REG), bytes of local memory (STACK, LOCAL: spills), and of
        shared memory per block (SHARED).
        """
        compiled = self.compile(arch)
        used = resource_usage(compiled.asm["cubin"])
        used["SHARED"] += compiled.metadata.shared
        return used


def record(monkeypatch, launcher, *args, **kwargs) -> list[Launch]:
    """The launches of one call of ``launcher`` on CPU tensors; nothing runs."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        launches.append(Launch(self, arguments, {k: v for k, v in kwargs.items() if k not in names}))

    monkeypatch.setattr(JITFunction, "run", run)
    launcher(*args, **kwargs)
    return launches


def resource_usage(cubin: bytes) -> dict[str, int]:
    """The line of ``cuobjdump --dump-resource-usage`` for the one kernel; SHARED is only the static part."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text.stdout)}
