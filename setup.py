"""Maps the top-level folders to packages and builds the native core, memedge._core.

`export/` and `engine/` are installed as `memedge.export` and `memedge.engine`, so that an installed wheel never claims
the top-level names `export` and `engine`.

Without a compiler, or where compiling fails, the package installs all the same and computes in NumPy. Environment:
MEMEDGE_REQUIRE_CORE=1 makes that failure fatal, MEMEDGE_NO_CORE=1 doesn't try, MEMEDGE_WERROR=1 turns warnings into
errors (not those of Visual C++). The same holds for the core's device code, with nvcc as the compiler (from CUDA_HOME,
else from PATH): MEMEDGE_REQUIRE_CUDA=1, MEMEDGE_NO_CUDA=1.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

CUDA_REQUIRED = os.environ.get("MEMEDGE_REQUIRE_CUDA") == "1"
REQUIRED = CUDA_REQUIRED or os.environ.get("MEMEDGE_REQUIRE_CORE") == "1"
WERROR = os.environ.get("MEMEDGE_WERROR") == "1"
WARNINGS = ["-Wall", "-Wextra", "-Werror"] if WERROR else []

FOLDERS = {"memedge": "memedge", "memedge.engine": "engine", "memedge.export": "export"}

# Each file is compiled with its own instruction set's flags, all others with none: what runs anywhere stays so.
X86_FLAGS = {
    "csrc/guidance_stats_avx2.cc": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/guidance_stats_avx512.cc": ["-mavx512f", "-mavx512bw", "-mavx512vl"],
}
ARM_FLAGS = {"csrc/guidance_stats_neon.cc": []}
# By the last word of the platform's name. macOS says arm64, or universal2, where one compilation is for both. Visual
# C++ knows neither the flags nor __x86_64__: the core has the scalar path alone there.
ISA_FLAGS = {
    "x86_64": X86_FLAGS,
    "aarch64": ARM_FLAGS,
    "arm64": {} if sys.platform == "win32" else ARM_FLAGS,
    "universal2": {
        **{file: [word for flag in flags for word in ("-Xarch_x86_64", flag)] for file, flags in X86_FLAGS.items()},
        **ARM_FLAGS,
    },
}

# Each of these also runs on later chips of its generation. All others compile the PTX when they load it; the oldest
# serves the most of them, and the kernel uses nothing newer.
CUDA_TARGETS = (75, 80, 86, 89, 90, 100, 120)
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    *(f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in CUDA_TARGETS),
    f"-gencode=arch=compute_{CUDA_TARGETS[0]},code=compute_{CUDA_TARGETS[0]}",
    "-cudart=static",
    "--threads=0",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    *(["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"] if WERROR else []),
]


def packages_in(package, folder):
    return [package, *(f"{package}.{name}" for name in find_packages(folder))]


def say_missing(what, reason, remedy):
    line = "=" * 100
    print(
        f"{line}\nmemedge: {what}\nReason: {reason}\n{remedy}\n{line}",
        file=sys.stderr,
        flush=True,
    )


def say_core_missing(reason):
    say_missing(
        "the native core was NOT built; everything works, in NumPy, more slowly.",
        reason,
        "With a C++17 compiler (and pybind11, unless pip fetches it), reinstall memedge to get it.",
    )


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def cuda_runtime(nvcc):
    """The static CUDA runtime that belongs to this nvcc; nvcc itself may be a script that calls the real one."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-cudart=static", "none.o"], capture_output=True, text=True, check=True)
    for word in dry_run.stderr.replace('"', " ").split():
        if word.startswith("-L") and Path(library := f"{word[2:]}/libcudart_static.a").is_file():
            return library
    raise FileNotFoundError("CUDA's libcudart_static.a is not installed")


class BuildCore(build_ext):
    """Compiles every file with its own flags, and forgives failure unless MEMEDGE_REQUIRE_CORE=1."""

    def add_device_code(self, ext):
        """Compile the kernel for every target and link CUDA's runtime into the core, which needs no driver to load."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise FileNotFoundError("nvcc is neither in CUDA_HOME nor on PATH")
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        compiled = []
        for source in ("csrc/guidance_stats.cu", "csrc/guidance_step.cu", "csrc/to_host.cu"):
            compiled.append(str(temp / f"{Path(source).name}.o"))
            subprocess.run([nvcc, *NVCC_FLAGS, "-c", source, "-o", compiled[-1]], check=True)
        ext.extra_objects += [*compiled, cuda_runtime(nvcc)]
        ext.sources.append("csrc/module_cuda.cc")
        ext.define_macros.append(("MEMEDGE_CUDA_TARGETS", ",".join(map(str, CUDA_TARGETS))))
        # CUDA's runtime stays private, so that it cannot be mistaken for PyTorch's.
        ext.extra_link_args += ["-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]

    def try_device_code(self, ext):
        if os.environ.get("MEMEDGE_NO_CUDA") == "1":
            return
        try:
            self.add_device_code(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if CUDA_REQUIRED:
                raise
            say_missing(
                "the CUDA reduction was NOT built; everything else is.",
                error,
                "With CUDA's compiler, nvcc 12.8 or newer, reinstall memedge to get it.",
            )

    def build_extension(self, ext):
        try:
            architecture = self.plat_name.rpartition("-")[2]
            for source, flags in ISA_FLAGS.get(architecture, {}).items():
                ext.extra_objects += self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    extra_postargs=[*ext.extra_compile_args, *flags],
                    depends=ext.depends,
                )
            self.try_device_code(ext)
            super().build_extension(ext)
        except Exception as error:
            if REQUIRED:
                raise
            say_core_missing(error)


def native_core():
    if os.environ.get("MEMEDGE_NO_CORE") == "1":
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError as error:
        if REQUIRED:
            raise
        say_core_missing(error)
        return []
    core = Pybind11Extension(
        "memedge._core",
        ["csrc/guidance_stats.cc", "csrc/guidance_step.cc", "csrc/module.cc"],
        depends=[
            "csrc/binding.h",
            "csrc/block_sums.cuh",
            "csrc/guidance_stats.cu",
            "csrc/guidance_stats.cuh",
            "csrc/guidance_stats.h",
            "csrc/guidance_step.cu",
            "csrc/guidance_step.h",
            "csrc/on_device.h",
            "csrc/row_loop.h",
            "csrc/serial.h",
            "csrc/to_host.cu",
        ],
        cxx_std=17,
        # Visual C++ optimizes and threads without being asked.
        extra_compile_args=[] if sys.platform == "win32" else ["-O3", "-pthread", *WARNINGS],
        extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
    )
    core.optional = not REQUIRED  # setuptools then accepts that the built file is missing
    return [core]


setup(
    packages=[name for package, folder in FOLDERS.items() for name in packages_in(package, folder)],
    package_dir=FOLDERS,
    include_package_data=False,  # package_data alone says what is installed, MANIFEST.in what the sdist holds
    package_data={
        "memedge": ["data/**/*", "py.typed"],
        "memedge.integrations.comfyui": ["pyproject.toml", "requirements.txt", "example_workflows/**/*.json"],
    },
    # Computed or compiled here, for this machine.
    exclude_package_data={
        "memedge": ["data/engine/baseline.*-*.safetensors", "data/engine/plans/*", "data/engine/plans/**/*"]
    },
    ext_modules=native_core(),
    cmdclass={"build_ext": BuildCore},
)
