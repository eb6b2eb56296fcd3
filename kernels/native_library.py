"""The compiled kernels: built from kernels/native/*.c for each instruction set, loaded for this CPU's.

`python -m kernels.native_library` compiles (make setup does it). Without a compiler, or where loading fails, `load`
returns None and torch's operators are used. The library uses torch's own threads: it is given the addresses of two
functions of the OpenMP runtime that torch has loaded, so that torch.set_num_threads holds for it too.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
BUILD = SOURCES / "build"
FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")
AVX512_CPU = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")


@dataclass(frozen=True)
class InstructionSet:
    """One build of the library."""

    name: str
    flags: tuple[str, ...]  # of the compiler
    cpu_flags: frozenset[str]  # that /proc/cpuinfo must list


INSTRUCTION_SETS = {
    "x86_64": (  # the fastest first
        InstructionSet(
            "amx",
            (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
            frozenset({*AVX512_CPU, "avx512_bf16", "amx_tile", "amx_bf16"}),
        ),
        InstructionSet(
            "avx512_bf16",
            (*AVX512, "-mavx512bf16"),
            frozenset({*AVX512_CPU, "avx512_bf16"}),
        ),
        InstructionSet("avx512_vnni", AVX512, frozenset(AVX512_CPU)),
        InstructionSet("avx2", AVX2, frozenset({"avx2", "fma", "f16c"})),
        InstructionSet("portable", (), frozenset()),
    ),
    "aarch64": (InstructionSet("portable", (), frozenset()),),
}


class CompilerFailed(RuntimeError):
    """No compiler, or it failed; the message is one line for the operator."""


def instruction_sets() -> tuple[InstructionSet, ...]:
    """The builds for this machine's architecture, the fastest first; none where the library is not built."""
    return INSTRUCTION_SETS.get(platform.machine(), ()) if sys.platform == "linux" else ()


def usable() -> tuple[InstructionSet, ...]:
    """Those of them that this CPU has."""
    found = _cpu_flags()
    return tuple(each for each in instruction_sets() if each.cpu_flags <= found)


def path_of(instruction_set: str) -> Path:
    """Where the library of one instruction set is; the name changes with the sources."""
    return BUILD / f"{instruction_set}-{_digest()}.so"


def compile_all(sets: Sequence[InstructionSet]) -> list[str]:
    """Compile what is not there yet. Returns a line for each instruction set that cannot be compiled."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [error for error in pool.map(_error_of, sets) if error]


def _error_of(instruction_set: InstructionSet) -> str | None:
    try:
        _compile(instruction_set)
    except CompilerFailed as error:
        return str(error)
    return None


def _compile(instruction_set: InstructionSet) -> None:
    target = path_of(instruction_set.name)
    if target.exists():
        return
    compiler = os.environ.get("CC") or next((found for n in ("cc", "gcc", "clang") if (found := shutil.which(n))), None)
    if compiler is None:
        raise CompilerFailed("no C compiler was found (Debian: apt-get install gcc libc6-dev)")
    BUILD.mkdir(exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    command = [compiler, *FLAGS, *instruction_set.flags, "-o", str(part), *sources, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        part.unlink(missing_ok=True)
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise CompilerFailed(f"{compiler} failed for {instruction_set.name}: {first}")
    part.replace(target)
    for old in BUILD.glob("*.so"):
        if _digest() not in old.name:
            old.unlink(missing_ok=True)


@cache
def load(instruction_set: str | None = None) -> ctypes.CDLL | None:
    """The library of one instruction set, by default the fastest that is compiled and that this CPU has."""
    names = [each.name for each in usable()] if instruction_set is None else [instruction_set]
    for name in names:
        if path_of(name).exists():
            try:
                library = ctypes.CDLL(str(path_of(name)))
            except OSError as error:
                logger.warning("%s cannot be loaded: %s", path_of(name).name, error)
                continue
            if not library.enable_instructions():
                logger.warning("the system does not allow the instructions of %s", path_of(name).name)
                continue
            library.set_threading.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
            library.set_threading.restype = None
            library.set_threading(*_openmp_functions())
            return library
    return None


@cache
def _openmp_functions() -> tuple[int | None, int | None]:
    """The addresses of GOMP_parallel and omp_get_max_threads in the runtime that torch uses; None without libgomp."""
    torch.get_num_threads()  # torch and its libraries are loaded
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if "libgomp" in path and "torch" in path:
                runtime = ctypes.CDLL(path)
                functions = (runtime.GOMP_parallel, runtime.omp_get_max_threads)
                return tuple(ctypes.cast(each, ctypes.c_void_p).value for each in functions)  # type: ignore[return-value]
    except (OSError, AttributeError):
        pass
    return None, None


@cache
def _digest() -> str:
    """Of the sources and the compiler's options."""
    options = [(FLAGS, each.name, each.flags) for each in instruction_sets()]
    content = hashlib.sha256(repr(options).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:12]


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split())
    except OSError:
        pass
    return frozenset()


def main(arguments: list[str]) -> int:
    """Compile for this CPU, with --all for every one of its architecture; one line says what was done or what is
    missing and what that costs."""
    errors: list[str] = []
    if "--all" in arguments:
        errors = compile_all(instruction_sets())
    else:
        for each in usable():  # an old compiler does not know the newest instructions
            failed = compile_all([each])
            errors += failed
            if not failed:
                break
    best = next((each.name for each in usable() if path_of(each.name).exists()), None)
    if best is None:
        reason = errors[-1] if errors else "this system is not supported"
        print(f"native kernels: not compiled, {reason}. Models run on torch's operators, at about half the speed.")
    else:
        print("; ".join([f"native kernels: compiled, this CPU uses {best}", *errors]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
