"""Which GPU there is, asked of stand-ins for CUDA's driver."""

import ctypes
import shutil
import subprocess

import pytest

from memedge.engine import gpu_target

DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return flags == 0 ? INIT : 1; }
int cuDeviceGet(int *device, int ordinal) { *device = 7; return ordinal == 0 ? COUNT : 101; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 12 : attribute == 76 ? 1 : -1;
    return device == 7 ? 0 : 101;
}
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, "NVIDIA GB10", size);
    return device == 7 ? 0 : 101;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, to make a driver with")
@pytest.mark.parametrize(
    ("init", "count", "expected"),
    [(0, 0, ("sm121", "NVIDIA GB10")), (100, 0, None), (0, 101, None)],
    ids=["one", "no driver running", "no device"],
)
def test_driver(tmp_path, monkeypatch, init, count, expected):
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so"
    defined = (f"-DINIT={init}", f"-DCOUNT={count}")
    subprocess.run(["cc", "-shared", "-fPIC", *defined, "-o", library, tmp_path / "driver.c"], check=True)
    driver = ctypes.CDLL(str(library))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver if name == "libcuda.so.1" else None)
    assert gpu_target.local_target() == expected


def test_no_driver(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert gpu_target.local_target() is None
