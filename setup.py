"""Where the packages lie, and the native kernels, which CMake builds (CMakeLists.txt).

The native kernels are optional. FASTEMBED_NATIVE=0 leaves them out, FASTEMBED_NATIVE=1 makes
it an error if they cannot be built; otherwise one line of the build's output (`pip -v`) says
why they are not there, and `python -m fastembed.info` says later that they are not.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
WISH = os.environ.get("FASTEMBED_NATIVE", "")

# A pip that is called by its path has a PATH without its own environment's cmake.
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def missing() -> str:
    """What the native build lacks; "" if nothing."""
    if sys.platform != "linux":
        return f"they are built on Linux only, not on {sys.platform}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not there at build time: install it first, then --no-build-isolation"
    if shutil.which("cmake", path=SEARCH) is None:
        return "cmake is not there"
    return ""


class CMakeBuild(build_ext):
    """Builds the one library of CMakeLists.txt into the package."""

    def run(self):
        if self.inplace:
            # A build that fails must not leave an older library behind as if it were this one.
            (ROOT / "fastembed" / "_native.so").unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, fullname):
        # No Python ABI in the name: the library uses torch's stable ABI and no libpython.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        torch = Path(importlib.util.find_spec("torch").origin).parent
        build = Path(self.build_temp).resolve()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.unlink(missing_ok=True)
        jobs = str(len(os.sched_getaffinity(0)))
        # Fresh: a cache of another folder, torch or FASTEMBED_CUDA would still hold its answers.
        self.cmake("configure", "--fresh", "-S", ROOT, "-B", build, f"-DFASTEMBED_TORCH={torch}")
        self.cmake("build", "--build", build, "--parallel", jobs)
        self.cmake("install", "--install", build, "--prefix", library.parent.parent)

    def cmake(self, step, *arguments):
        try:
            subprocess.run([shutil.which("cmake", path=SEARCH), *arguments], check=True)
        except subprocess.CalledProcessError as error:
            # setuptools prints this and goes on where the extension is optional.
            message = f"native kernels not built: cmake cannot {step}, its output above says why"
            raise CompileError(message) from error


def native() -> list[Extension]:
    if WISH == "0":
        return []
    lack = missing()
    if lack and WISH == "1":
        raise SystemExit(f"fastembed: native kernels cannot be built: {lack}")
    if lack:
        print(f"fastembed: native kernels skipped: {lack}", file=sys.stderr)  # noqa: T201
        return []
    return [Extension("fastembed._native", sources=[], optional=WISH != "1")]


# kernels/ itself is no package: transformers probes for one of that name and would find ours.
ROOMS = {"fastembed._numba": "kernels/numba", "fastembed._triton": "kernels/triton"}

setup(
    packages=[*find_packages(include=["fastembed", "fastembed.*"]), *ROOMS],
    package_dir=ROOMS,
    ext_modules=native(),
    cmdclass={"build_ext": CMakeBuild},
)
