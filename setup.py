"""Builds the extension modules; everything else lives in pyproject.toml."""

import glob
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit("tapelm: building needs torch: run `pip install torch -c constraints.txt` first")

OPS = sorted(set(glob.glob("csrc/*.cpp")) - {"csrc/python.cpp"})
LOADER = ["csrc/cuda/loader.cu", "csrc/cuda/python.cpp"]
GPUS = {"nvcc": ["-arch=all-major"]}  # PyTorch would choose those that it sees, and fails where it sees none
# OpenMP is compiled in but not linked: torch's runtime, already loaded, serves both with one thread pool.
FLOATS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS = ["-O3", "-g0", "-std=c++20", "-Wno-psabi", *FLOATS]
# A module linked to CUDA loads only beside it, and PyTorch refuses an nvcc of another major version.
MAJOR, NVCC = (torch.version.cuda or "").split(".")[0], Path(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc")
TOLD = subprocess.run([NVCC, "--version"], capture_output=True, text=True) if NVCC.is_file() else None
CUDA = MAJOR != "" and TOLD is not None and f"release {MAJOR}." in TOLD.stdout
MISSING = f", no CUDA {MAJOR} in {NVCC}" if MAJOR else ""


class Build(BuildExtension):
    """Says in one line what is built, and in one sentence when it cannot be."""

    def build_extensions(self) -> None:
        compiler, *options = self.compiler.compiler_cxx
        if shutil.which(compiler) is None:
            sys.exit(f"tapelm: no C++ compiler `{compiler}`; install one (`apt-get install g++`) or set CXX")
        macros = subprocess.check_output([compiler, *options, "-dM", "-E", "-xc++", "/dev/null"], text=True)
        if int(macros.partition("__GNUC__ ")[2].split()[0]) < 12:  # clang calls itself GCC 4
            sys.exit(f"tapelm: `{compiler}` is not GCC 12 or newer, which the kernels need; set CXX=g++")
        parts = f"CPU kernels, text extension{' and CUDA loader' if CUDA else '; no CUDA loader' + MISSING}"
        print(f"tapelm: building {parts} with {compiler} for torch {torch.__version__}", flush=True)
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension("tapelm._C", OPS, extra_compile_args=[*FLAGS, "-fopenmp"]),
        Extension(
            "tapelm._text",
            ["csrc/python.cpp", *sorted(glob.glob("csrc/text/*.cpp"))],
            include_dirs=[str(Path(torch.__file__).parent / "include")],
            extra_compile_args=FLAGS,
            language="c++",
        ),
        *([CUDAExtension("tapelm._cuda", LOADER, extra_compile_args=GPUS)] if CUDA else []),
    ],
    cmdclass={"build_ext": Build},
)
