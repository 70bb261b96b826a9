"""Which GPU this machine has, asked of the driver itself: no CUDA package needed."""

import ctypes

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, in cuda.h


def local_target() -> tuple[str, str] | None:
    """Return the first GPU's target, such as "sm89", and its model's name; None where CUDA's driver finds no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    # Each returns 0 for success; the first that fails ends it.
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
        or driver.cuDeviceGetName(name, len(name), device)
    )
    return None if failed else (f"sm{major.value}{minor.value}", name.value.decode(errors="replace"))
