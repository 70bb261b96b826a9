"""The native kernels against float64 truth: one body for every instruction set, dtype, pair of operands and shape."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.engine.precision import OPS

_core = pytest.importorskip("memedge._core", reason="the native core was not built", exc_type=ImportError)

ISAS = ("scalar", "neon", "avx2", "avx512")
DTYPES = ("float32", "float16", "bfloat16")
OPERANDS = ("uncond_delta", "cond_uncond", "cond_delta")
SHAPES = (  # rows, uncond_rows, channels, pixels
    (1, 1, 1, 1),
    (3, 1, 4, 1),
    (2, 2, 1, 7),
    (2, 1, 3, 15),
    (4, 2, 4, 17),
    (6, 3, 5, 33),
    (2, 1, 16, 511),
    (2, 2, 65, 31),
    (1, 1, 300, 9),
    (4, 2, 4, 4096),
    (1, 1, 4, 200_003),
)


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param not in _core.isa_available():
        pytest.skip(f"this build or processor has no {request.param}")
    return request.param


def stored(values, dtype):
    """The values as the kernel reads them; bfloat16, rounded by truncation, as its bits."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def exact(array, dtype):
    """What is stored, in float64."""
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return array.astype(np.float64)


def run(cond, uncond, dtype, operands="uncond_delta", isa="", threads=1, row=None):
    rows, channels, pixels = cond.shape
    out = np.full((3, rows), -7.0)
    pointers = cond.ctypes.data, uncond.ctypes.data, out.ctypes.data
    row_ptr = 0 if row is None else row.ctypes.data
    sizes = rows, len(uncond), channels, pixels
    bad = _core.guidance_stats(*pointers, dtype, *sizes, operands, threads, isa, row_ptr=row_ptr)
    return out, bad


def truth(cond, uncond, operands):
    """docs/methods.md §1 in float64: norm, cosine over channels averaged over pixels, cosine of all."""
    uncond = np.tile(uncond, (len(cond) // len(uncond), 1, 1))
    delta = cond - uncond
    a, b = {"uncond_delta": (uncond, delta), "cond_uncond": (cond, uncond), "cond_delta": (cond, delta)}[operands]

    def cosine(axis):
        norms = [np.maximum(np.sqrt((x * x).sum(axis)), 1e-8) for x in (a, b)]
        return (a * b).sum(axis) / (norms[0] * norms[1])

    return np.stack([np.sqrt((delta * delta).sum((1, 2))), cosine(1).mean(1), cosine((1, 2))])


def pair(shape, dtype, seed=0, shift=0.3):
    rows, uncond_rows, channels, pixels = shape
    rng = np.random.default_rng(seed)
    uncond = rng.standard_normal((uncond_rows, channels, pixels))
    cond = np.tile(uncond, (rows // uncond_rows, 1, 1)) + shift * rng.standard_normal((rows, channels, pixels))
    return stored(cond, dtype), stored(uncond, dtype)


def assert_close(out, expected, dtype):
    tolerance = OPS["guidance_stats", dtype]
    np.testing.assert_allclose(out[0], expected[0], rtol=tolerance.norm)
    np.testing.assert_allclose(out[1:], expected[1:], rtol=0, atol=tolerance.alignment)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(isa, dtype, operands, shape):
    cond, uncond = pair(shape, dtype)
    out, bad = run(cond, uncond, dtype, operands, isa)
    assert bad == 0
    assert_close(out, truth(exact(cond, dtype), exact(uncond, dtype), operands), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_chooses_the_uncond_row(isa, dtype):
    cond, _ = pair((7, 1, 4, 333), dtype)
    _, uncond = pair((3, 3, 4, 333), dtype, seed=1)
    row = np.array([2, 0, 0, 1, 2, 2, 1])
    out, bad = run(cond, uncond, dtype, isa=isa, threads=3, row=row)
    assert bad == 0
    assert_close(out, truth(exact(cond, dtype), exact(uncond, dtype)[row], "uncond_delta"), dtype)


@pytest.mark.parametrize("wrong", [-1, 3, 2**62])
def test_an_index_out_of_range_is_refused(wrong):
    cond, uncond = pair((6, 3, 1, 1), "float32")
    with pytest.raises(ValueError, match=f"row 4 is paired with uncond row {wrong} of 3"):
        run(cond, uncond, "float32", row=np.array([0, 1, 2, 0, wrong, 9]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_torch(isa, dtype):
    cond, uncond = pair((4, 2, 4, 333), dtype)
    out, _ = run(cond, uncond, dtype, isa=isa)
    c, u = (torch.from_numpy(exact(x, dtype)) for x in (cond, uncond))
    u = u.repeat(2, 1, 1)
    delta = c - u
    channel = torch.nn.functional.cosine_similarity(u, delta, dim=1).mean(1)
    flat = torch.nn.functional.cosine_similarity(u.flatten(1), delta.flatten(1), dim=1)
    assert_close(out, torch.stack([delta.flatten(1).norm(dim=1), channel, flat]).numpy(), dtype)


@pytest.mark.parametrize("shift", [1e-12, 1e-9, 1e-4])
def test_small_guidance_follows_the_clamp(isa, shift):
    cond, uncond = pair((2, 1, 4, 100), "float32", shift=shift)
    uncond[:] = uncond * np.float32(shift)
    cond = np.ascontiguousarray(uncond + shift * np.ones_like(cond))
    out, _ = run(cond, uncond, "float32", isa=isa)
    assert_close(out, truth(exact(cond, "float32"), exact(uncond, "float32"), "uncond_delta"), "float32")


@pytest.mark.parametrize("scale", [1e10, 1e15])
def test_large_values_keep_their_cosine(isa, scale):
    """The product of the squared norms is beyond float32 here, their reciprocal roots are not."""
    cond, uncond = pair((2, 1, 4, 100), "float32")
    cond, uncond = cond * np.float32(scale), uncond * np.float32(scale)
    out, _ = run(cond, uncond, "float32", isa=isa)
    assert_close(out, truth(exact(cond, "float32"), exact(uncond, "float32"), "uncond_delta"), "float32")


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_give_zero(isa, dtype, operands):
    zero, other = stored(np.zeros((1, 4, 19)), dtype), pair((1, 1, 4, 19), dtype)[0]
    same, bad = run(other, other, dtype, operands, isa)
    assert bad == 0 and same[0, 0] == 0
    assert same[1, 0] == pytest.approx(1.0 if operands == "cond_uncond" else 0.0)
    nothing, bad = run(zero, zero, dtype, operands, isa)
    assert bad == 0 and not nothing.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_is_widened_exactly(isa, dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    array = bits if dtype == "bfloat16" else bits.view(np.float16)
    value = exact(array, dtype)
    usable = np.isfinite(value) & (np.abs(value) < 1e15) & (np.abs(value) > 1e-15)
    cond = np.ascontiguousarray(array[usable]).reshape(-1, 1, 1)
    out, bad = run(cond, np.zeros_like(cond[:1]), dtype, isa=isa)
    assert bad == 0
    np.testing.assert_allclose(out[0], np.abs(value[usable]), rtol=1e-15)


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_never_passes_at_any_position(isa, dtype, operands):
    """One bad value, in every place of a row with whole vectors and a tail, in either input."""
    pixels = 37
    for values in (np.nan, np.inf, -np.inf):
        for side in (0, 1):
            inputs = list(pair((3, 3, 2, pixels), dtype))
            inputs = [np.ascontiguousarray(np.tile(x[:1], (2 * pixels, 1, 1))) for x in inputs]
            bad_bits = stored(np.full(1, values), dtype)[0]
            for row in range(2 * pixels):
                inputs[side][row, row // pixels, row % pixels] = bad_bits
            out, bad = run(*inputs, dtype, operands, isa)
            assert bad == 2 * pixels
            assert np.isnan(out).all()


@pytest.mark.parametrize("operands", OPERANDS)
def test_bad_rows_leave_the_others_alone(isa, operands):
    cond, uncond = pair((6, 2, 4, 50), "float32")
    clean, _ = run(cond, uncond, "float32", operands, isa)
    cond[4, 2, 49] = np.nan
    cond[1, 0, 0] = np.inf
    out, bad = run(cond, uncond, "float32", operands, isa)
    assert bad == 2
    assert np.isnan(out[:, [1, 4]]).all()
    np.testing.assert_array_equal(out[:, [0, 2, 3, 5]], clean[:, [0, 2, 3, 5]])


@pytest.mark.parametrize("value", [1e20, 3e38])
def test_overflow_is_truth_or_not_finite(isa, value):
    """Squares beyond float32: the scalar path, in double, knows the truth; a vector path must not invent a cosine."""
    cond = np.full((1, 4, 20), value, np.float32)
    uncond = np.full((1, 4, 20), 1.0, np.float32)
    for operands in OPERANDS:
        out, bad = run(cond, uncond, "float32", operands, isa)
        if bad:
            assert np.isnan(out).all()
        else:
            np.testing.assert_allclose(
                out, truth(exact(cond, "float32"), exact(uncond, "float32"), operands), rtol=1e-6
            )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(1, 9),
    pixels=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    operands=st.sampled_from(OPERANDS),
    exponent=st.integers(-6, 6),
)
def test_cauchy_schwarz_and_scale(seed, channels, pixels, dtype, operands, exponent):
    """|cos| ≤ 1; a common factor (a power of two, exact in every dtype) scales the norm and leaves the cosines."""
    cond, uncond = pair((2, 1, channels, pixels), "float32", seed)
    cond, uncond = (stored(np.clip(x, -4, 4).round(2), dtype) for x in (cond, uncond))
    factor = 2.0**exponent
    scaled = [stored(exact(x, dtype) * factor, dtype) for x in (cond, uncond)]
    expected_scaled = truth(*(exact(x, dtype) for x in scaled), operands)
    for isa in _core.isa_available():
        out, bad = run(cond, uncond, dtype, operands, isa)
        assert bad == 0
        assert (np.abs(out[1:]) <= 1).all()
        grown, _ = run(*scaled, dtype, operands, isa)
        assert_close(grown, expected_scaled, dtype)
        if (exact(scaled[0], dtype) == exact(cond, dtype) * factor).all():
            assert_close(grown, np.stack([out[0] * factor, out[1], out[2]]), dtype)


@settings(max_examples=60, deadline=None)
@given(
    place=st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 129)),
    bits=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    operands=st.sampled_from(OPERANDS),
)
def test_any_bits_give_truth_or_not_finite(place, bits, dtype, operands):
    """Whatever bits stand in one place, a finite result is the true one and a NaN or infinity never has one."""
    inputs = pair((1, 1, 5, 130), dtype)
    side, channel, pixel = place
    array = inputs[side]
    unsigned = np.uint32 if dtype == "float32" else np.uint16
    array.view(unsigned)[0, channel, pixel] = bits & np.iinfo(unsigned).max
    values = [exact(x, dtype) for x in inputs]
    for isa in _core.isa_available():
        out, bad = run(*inputs, dtype, operands, isa)
        if bad:
            assert np.isnan(out).all()
            assert not (np.abs(values[side][0, channel, pixel]) < 1e15)
        else:
            assert_close(out, truth(*values, operands), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_results(isa, dtype):
    cond, uncond = pair((40, 4, 4, 9000), dtype)
    one, _ = run(cond, uncond, dtype, isa=isa)
    for threads in (0, 2, 3, 64):
        many, _ = run(cond, uncond, dtype, isa=isa, threads=threads)
        np.testing.assert_array_equal(many, one)


def test_releases_the_gil():
    """While a long call runs in a thread, this thread keeps running Python."""
    cond, uncond = pair((1, 1, 4, 200_000), "float16")
    finished = threading.Event()

    def work():
        for _ in range(10):
            run(cond, uncond, "float16", isa="scalar")
        finished.set()

    thread = threading.Thread(target=work)
    thread.start()
    ticks = 0
    while not finished.is_set():
        ticks += 1
        time.sleep(0.0005)
    thread.join()
    assert ticks > 11  # a held lock would let this loop in only between the ten calls


def test_calls_from_many_threads_do_not_mix():
    jobs = [pair((8, 2, 4, 700), "float32", seed) for seed in range(4)]
    expected = [run(*job, "float32")[0] for job in jobs]
    failures = []

    def work(index):
        for _ in range(50):
            if not np.array_equal(run(*jobs[index], "float32", threads=2)[0], expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_unaligned_memory(isa):
    cond, uncond = pair((2, 1, 4, 37), "float32")
    raw = np.zeros(cond.nbytes + 1, np.uint8)
    raw[1:] = cond.view(np.uint8).ravel()
    shifted = np.ndarray(cond.shape, np.float32, raw, offset=1)
    np.testing.assert_array_equal(run(shifted, uncond, "float32", isa=isa)[0], run(cond, uncond, "float32", isa=isa)[0])


def test_dispatch_is_reported():
    assert _core.isa_available()[0] == "scalar"
    assert _core.isa_active() == _core.isa_available()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond_ptr": 0}, "null"),
        ({"rows": 0}, "zero"),
        ({"rows": 3}, "multiple"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"operands": "both"}, "operands 'both'"),
        ({"isa": "mmx"}, "isa 'mmx'"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    cond, uncond = pair((2, 2, 1, 1), "float32")
    out = np.empty((3, 2))
    arguments = {
        "cond_ptr": cond.ctypes.data,
        "uncond_ptr": uncond.ctypes.data,
        "out_ptr": out.ctypes.data,
        "dtype": "float32",
        "rows": 2,
        "uncond_rows": 2,
        "channels": 1,
        "pixels": 1,
    }
    with pytest.raises(ValueError, match=message):
        _core.guidance_stats(**(arguments | change))


def test_missing_instruction_sets_are_refused():
    missing = sorted(set(ISAS) - set(_core.isa_available()))
    assert missing  # no processor has both NEON and AVX
    cond, uncond = pair((1, 1, 1, 1), "float32")
    with pytest.raises(ValueError, match="cannot run"):
        run(cond, uncond, "float32", isa=missing[0])
