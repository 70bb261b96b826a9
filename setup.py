"""Maps the top-level folders to packages and builds the native core, memedge._core.

`export/` and `engine/` are installed as `memedge.export` and `memedge.engine`, so that an installed wheel never claims
the top-level names `export` and `engine`.

Without a compiler, or where compiling fails, the package installs all the same and computes in NumPy. Environment:
MEMEDGE_REQUIRE_CORE=1 makes that failure fatal, MEMEDGE_NO_CORE=1 doesn't try, MEMEDGE_WERROR=1 turns warnings into
errors.
"""

import os
import sys

from setuptools import setup
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("MEMEDGE_REQUIRE_CORE") == "1"
WARNINGS = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("MEMEDGE_WERROR") == "1" else []

# Each file is compiled with its own instruction set's flags, all others with none: what runs anywhere stays so.
ISA_FLAGS = {
    "x86_64": {
        "csrc/guidance_stats_avx2.cc": ["-mavx2", "-mfma", "-mf16c"],
        "csrc/guidance_stats_avx512.cc": ["-mavx512f", "-mavx512bw", "-mavx512vl"],
    },
    "aarch64": {"csrc/guidance_stats_neon.cc": []},
}


def say_missing(reason):
    line = "=" * 100
    print(
        f"{line}\nmemedge: the native core was NOT built; everything works, in NumPy, more slowly.\n"
        f"Reason: {reason}\n"
        f"With a C++17 compiler (and pybind11, unless pip fetches it), reinstall memedge to get it.\n{line}",
        file=sys.stderr,
        flush=True,
    )


class BuildCore(build_ext):
    """Compiles every file with its own flags, and forgives failure unless MEMEDGE_REQUIRE_CORE=1."""

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
            super().build_extension(ext)
        except Exception as error:
            if REQUIRED:
                raise
            say_missing(error)


def native_core():
    if os.environ.get("MEMEDGE_NO_CORE") == "1":
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError as error:
        if REQUIRED:
            raise
        say_missing(error)
        return []
    core = Pybind11Extension(
        "memedge._core",
        ["csrc/guidance_stats.cc", "csrc/module.cc"],
        depends=["csrc/guidance_stats.h", "csrc/row_loop.h", "csrc/serial.h"],
        cxx_std=17,
        extra_compile_args=["-O3", "-pthread", *WARNINGS],
        extra_link_args=["-pthread"],
    )
    core.optional = not REQUIRED  # setuptools then accepts that the built file is missing
    return [core]


setup(
    packages=["memedge", "memedge.engine", "memedge.export"],
    package_dir={"memedge": "memedge", "memedge.engine": "engine", "memedge.export": "export"},
    include_package_data=False,  # package_data alone says what is installed, MANIFEST.in what the sdist holds
    package_data={"memedge": ["data/**/*", "py.typed"]},
    # Computed or compiled here, for this machine.
    exclude_package_data={
        "memedge": ["data/engine/baseline.*-*.safetensors", "data/engine/plans/*", "data/engine/plans/**/*"]
    },
    ext_modules=native_core(),
    cmdclass={"build_ext": BuildCore},
)
