"""What a captured launch compiles to, per target and without a GPU: registers, spills, shared memory,
instructions.

Facts of NVIDIA targets are read from the machine code (SASS) with the tools that ship inside Triton; those of
AMD targets from the assembly's metadata. The share of 128-bit loads weighs each load of the kernel's source
by the bytes of its tile, so that a scalar does not weigh like a row; which instructions a load became is
known from their source files and lines. Occupancy: resident warps of the largest number that a
multiprocessor holds.

Kernels are compiled with line information, as they are for users, and anew, with ptxas at fixed addresses: of
one and the same PTX it makes one of several programs, depending on the addresses that it happens to get (one
of our kernels has 188 registers or 191). What is left are long paths of its files, which move them as well.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from tapelm.proofs.launches import Specialized

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_PERSONALITY_NOW, _ADDR_NO_RANDOMIZE = 0xFFFFFFFF, 0x0040000  # sys/personality.h


@dataclass(frozen=True)
class Target:
    """A GPU to compile for and the limits of one of its multiprocessors.

    ``registers`` are per SIMD lane group of a multiprocessor (AMD: per lane of one of four SIMDs); ``shared``
    is the most that one block may have and ``shared_total`` what the multiprocessor has, in bytes.
    """

    name: str
    gpu: GPUTarget
    registers: int
    shared: int
    shared_total: int
    warps: int
    blocks: int


def _nvidia(capability: int, shared: int, shared_total: int, warps: int, blocks: int) -> Target:
    return Target(
        f"sm_{capability}", GPUTarget("cuda", capability, 32), 65536, shared, shared_total, warps, blocks
    )


# CUDA C++ programming guide, technical specifications per compute capability; CDNA3 ISA guide.
TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 166912, 167936, 64, 32),
        _nvidia(86, 101376, 102400, 48, 16),
        _nvidia(89, 101376, 102400, 48, 24),
        _nvidia(90, 232448, 233472, 64, 32),
        _nvidia(100, 232448, 233472, 64, 32),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 512, 65536, 65536, 32, 32),
    )
}


@dataclass(frozen=True)
class Resources:
    """Facts of one kernel on one target."""

    registers: int
    """Per thread; on AMD vector and accumulator registers together."""
    spilled: int
    """Bytes per thread in local memory (NVIDIA) or scratch (AMD)."""
    shared: int
    """Bytes per block."""
    warps: int
    """Per block; a warp is 32 threads, on AMD 64."""
    occupancy: float
    values: float
    """Elements of the largest tile that the source loads, per thread."""
    wide_loads: float
    """Share of the bytes of all loads in the source that 128-bit instructions bring."""
    tensor_cores: dict[str, int]
    """Matrix instructions by kind: HMMA (sm_80-89), HGMMA (sm_90), UTCHMMA (sm_100), MFMA (AMD); and what
    feeds them: UTMALDG, copies of whole tiles (sm_90 and later)."""


@contextmanager
def fixed_addresses() -> Iterator[bool]:
    """Within it, programs that this process starts are loaded at the same addresses every time.

    It yields whether they are: Docker's default seccomp profile refuses it.
    """
    personality = ctypes.CDLL(None).personality
    before = personality(ctypes.c_ulong(_PERSONALITY_NOW))
    fixed = personality(ctypes.c_ulong(before | _ADDR_NO_RANDOMIZE)) != -1
    try:
        yield fixed
    finally:
        if fixed:
            personality(ctypes.c_ulong(before))


def compile_resources(specialized: Specialized, target: Target, *, fixed: bool = True) -> Resources:
    """Compiles for ``target`` and reads the facts off the result; without ``fixed`` with ptxas at random
    addresses, as users have it.

    Raises:
        triton.CompilationError: the kernel does not compile for the target.
    """
    with knobs.compilation.scope(), fixed_addresses() if fixed else nullcontext():
        knobs.compilation.always_compile = True  # Triton's cache may hold another of ptxas' programs
        compiled = triton.compile(specialized.source, target=target.gpu, options=specialized.options)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if target.gpu.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        spilled = _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
        tensor_cores = Counter(MFMA=len(re.findall(r"\bv_mfma_", assembly)))
        # Each of four SIMDs holds 512 registers a lane and hands them out by eight.
        per_simd = min(target.registers // (-(-registers // 8) * 8), target.warps // 4)
        blocks = min(per_simd * 4 // warps, target.shared_total // max(shared, 1), target.blocks)
    else:
        assembly = compiled.asm["ptx"]
        registers, spilled, tensor_cores = _machine_code(compiled.asm["cubin"])
        # A warp takes registers in units of 256; each block takes 1 KiB of shared memory for itself.
        per_warp = -(-registers * 32 // 256) * 256
        by_registers, by_shared = (
            target.registers // (per_warp * warps),
            target.shared_total // (shared + 1024),
        )
        blocks = min(by_registers, by_shared, target.warps // warps, target.blocks)
    return Resources(
        registers, spilled, shared, warps, round(blocks * warps / target.warps, 3),
        _largest_tile(compiled.asm["ttir"]) / (warps * target.gpu.warp_size),
        round(_wide_share(compiled.asm["ttir"], assembly), 3), dict(+tensor_cores),
    )  # fmt: skip


def _machine_code(cubin: bytes) -> tuple[int, int, Counter[str]]:
    """Registers and bytes of local memory per thread, and the matrix instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    registers, stack, local = (_number(rf"{key}:(\d+)", usage) for key in ("REG", "STACK", "LOCAL"))
    # "/*0010*/  @!P0 HMMA.16816.F32.BF16 R4, ..."
    opcodes = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*MMA|UTMALDG)\b", listing)
    return registers, stack + local, Counter(opcodes)


def _largest_tile(ttir: str) -> int:
    shapes = re.findall(r"tt\.(?:descriptor_)?load .*\btensor<((?:\d+x)+)(?:!tt\.ptr<)?\w+>>? loc", ttir)
    return max((math.prod(int(size) for size in shape.rstrip("x").split("x")) for shape in shapes), default=1)


def _wide_share(ttir: str, assembly: str) -> float:
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def line(place: str) -> tuple[str, int]:
        # 'loc("x"(#loc5))' names #loc5; 'callsite(#loc5 at #loc9)' was inlined from #loc5.
        while (direct := re.match(r'"(?:.*/)?(.*)":(\d+):\d+', places[place])) is None:
            inner = re.search(r"#loc\d*", places[place])
            assert inner is not None, places[place]
            place = inner[0]
        return direct[1], int(direct[2])

    tiles: Counter[tuple[str, int]] = Counter()
    copies: Counter[tuple[str, int]] = Counter()
    for kind, place in re.findall(r"tt\.load .* : (\S+) loc\((#loc\d*)\)", ttir):
        shape, bits = re.fullmatch(r"(?:tensor<((?:\d+x)+))?!tt\.ptr<\D+(\d+)>>?", kind).groups()  # type: ignore[union-attr]
        elements = math.prod(int(size) for size in (shape or "1x").rstrip("x").split("x"))
        tiles[line(place)] += elements * int(bits) // 8
        copies[line(place)] += 1
    # '.file 1 "/x/y.py"' in PTX, '.file 1 "/x" "y.py"' in AMD's assembly, behind the lines that use it.
    names = dict(re.findall(r'^\s*\.file\s+(\d+) .*?([^/"]+)"$', assembly, re.MULTILINE))
    wide: Counter[tuple[str, int]] = Counter()
    total: Counter[tuple[str, int]] = Counter()
    current, inline = ("", 0), False
    for text in assembly.splitlines():
        if "inline asm" in text:
            inline = "begin" in text
        elif found := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            # Within inline assembly, LLVM counts its lines on from the source line.
            current = current if inline else (names[found[1]], int(found[2]))
        elif size := _loaded_bytes(text):
            total[current] += size
            wide[current] += size if size >= 16 else 0
    # Of the copies of an unrolled load one goes over whole blocks and the others over what is left at the
    # end.
    shares = {at: min(1.0, copies[at] * wide[at] / total[at]) for at in tiles if total[at]}
    loaded = sum(tiles[at] for at in shares)
    return sum(tiles[at] * share for at, share in shares.items()) / loaded if loaded else 1.0


def _loaded_bytes(instruction: str) -> int:
    """Bytes per thread that one line of PTX or AMD assembly loads from global memory; 0 for other lines."""
    if found := re.search(r"\bld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\b", instruction):
        return int(found[1] or 1) * int(found[2]) // 8
    if found := re.search(r"\bcp\.async\.c[ag]\.shared\.global .*?\], (0x[0-9a-f]+|\d+)", instruction):
        return int(found[1], 0)
    if "cp.async.bulk" in instruction and ".global" in instruction:
        return 16
    if found := re.search(r"\b(?:global|buffer)_load_(?:lds_)?(dword(?:x\d)?|\w+)", instruction):
        return {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}.get(
            found[1], 1 if "byte" in found[1] else 2
        )
    return 0


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"resources: no {pattern!r} in the compiler's report; its format has changed.")
    return int(found[1])


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
