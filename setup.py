"""Builds ``offload._native`` with the project's one CMake file.

torch is neither imported nor linked: the extension takes (pointer, bytes), so one build serves
every torch version. CMAKE_ARGS, as elsewhere, adds to CMake's command line: "-DOFFLOAD_CUDA=OFF".
Project metadata stands in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SUPPORTED_MACHINES = ("x86_64", "aarch64")


def check_platform() -> None:
    """Exit with a clear message where offload cannot work."""
    if sys.platform != "linux":
        sys.exit(f"offload needs Linux (O_DIRECT, O_TMPFILE, fallocate); this is {sys.platform}.")
    if platform.machine() not in SUPPORTED_MACHINES or sys.maxsize < 2**32:
        sys.exit(
            f"offload supports 64-bit {' and '.join(SUPPORTED_MACHINES)}; "
            f"this is {platform.machine()} with a {sys.maxsize.bit_length() + 1}-bit Python."
        )


class CMakeBuild(build_ext):
    """Configures and builds the CMake target ``_native`` into the place setuptools expects.

    The CMake folder is kept under build/, so a second build compiles only what changed.
    """

    def build_extension(self, ext: Extension) -> None:
        import cmake
        import ninja
        import pybind11

        cmake_exe = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        ninja_exe = str(Path(ninja.BIN_DIR) / "ninja")
        module_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        target = ext.name.rpartition(".")[2]
        build_type = "RelWithDebInfo" if self.debug else "Release"
        configure = [
            *(cmake_exe, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja_exe}",
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        build = [cmake_exe, "--build", str(build_dir), "--target", target]
        for command in (configure, build):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise CompileError(
                    f"{ext.name}: {shlex.join(command)} failed, see above"
                ) from error


check_platform()
setup(ext_modules=[Extension("offload._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
