"""What this machine's processors can do at most: the yardstick of `memedge bench`."""

import os
import subprocess
import sys

BLAS = ("OPENBLAS", "OMP", "MKL", "BLIS", "VECLIB")
MEASURE = """
import sys, time
import numpy as np
a = np.random.default_rng(0).random((1024, 1024), dtype=np.float32)
b = a.T.copy()
fastest, end = float("inf"), time.perf_counter() + float(sys.argv[1])
while time.perf_counter() < end:
    start = time.perf_counter()
    a @ b
    fastest = min(fastest, time.perf_counter() - start)
print(2 * 1024**3 / fastest / 1e9)
"""


def gemm_gflops(threads: int, seconds: float) -> float:
    """Return the 10⁹ float32 operations per second of NumPy's 1024³ matrix product, the fastest of `seconds` of them.

    It runs in a process of its own: the number of threads is fixed when a BLAS is loaded, whichever NumPy was built
    with, and its memory is not counted in this process.
    """
    limits = {f"{name}_{'MAXIMUM' if name == 'VECLIB' else 'NUM'}_THREADS": str(threads) for name in BLAS}
    # -P: a file numpy.py in the current folder is not NumPy.
    command = [sys.executable, "-P", "-c", MEASURE, str(seconds)]
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=True)
    return float(done.stdout)
