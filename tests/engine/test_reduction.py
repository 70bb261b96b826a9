"""reduce_rows: what it accepts, pairs, refuses and reports, on the native and on the NumPy path."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memedge.engine import dlpack, reduction
from memedge.engine.errors import InputError, NotFiniteError
from memedge.engine.precision import OPS
from memedge.engine.reduction import core_status, reduce_indexed, reduce_rows


@pytest.fixture(params=["native", "numpy"], autouse=True)
def path(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(reduction, "core", None)
    elif reduction.core is None:
        pytest.skip(f"no native core: {reduction._reason}")
    return request.param


def truth(cond, uncond, operands="uncond_delta"):
    """docs/methods.md §1 in float64, for NumPy arrays that broadcast."""
    cond, uncond = np.broadcast_arrays(np.asarray(cond, np.float64), np.asarray(uncond, np.float64))
    delta = cond - uncond
    a, b = {"uncond_delta": (uncond, delta), "cond_uncond": (cond, uncond), "cond_delta": (cond, delta)}[operands]

    def cosine(axis):
        norms = [np.maximum(np.sqrt((x * x).sum(axis)), 1e-8) for x in (a, b)]
        return (a * b).sum(axis) / (norms[0] * norms[1])

    return np.sqrt((delta**2).sum((-3, -2, -1))), cosine(-3).mean((-2, -1)), cosine((-3, -2, -1))


def assert_truth(rows, cond, uncond, operands="uncond_delta", dtype="float32"):
    tolerance = OPS["guidance_stats", dtype]
    norm, channel, flat = truth(cond, uncond, operands)
    assert rows.norm.shape == rows.channel.shape == rows.flat.shape == np.shape(cond)[:-3]
    assert rows.norm.dtype == rows.channel.dtype == rows.flat.dtype == np.float64
    np.testing.assert_allclose(rows.norm, norm, rtol=tolerance.norm)
    np.testing.assert_allclose(rows.channel, channel, rtol=0, atol=tolerance.alignment)
    np.testing.assert_allclose(rows.flat, flat, rtol=0, atol=tolerance.alignment)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("operands", reduction.OPERANDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("cond_shape", "uncond_shape"),
    [
        ((4, 8, 8), (4, 8, 8)),
        ((4, 8, 8), (1, 4, 8, 8)),
        ((5, 4, 8, 8), (4, 8, 8)),
        ((5, 4, 8, 8), (1, 4, 8, 8)),
        ((3, 2, 2, 4, 5, 7), (2, 2, 4, 5, 7)),
        ((3, 2, 2, 4, 5, 7), (2, 4, 5, 7)),
        ((3, 2, 1, 4, 5, 7), (1, 1, 4, 5, 7)),
        ((2, 3, 300, 300), (3, 300, 300)),
        ((2, 70_000, 1, 2), (2, 70_000, 1, 2)),
        ((200, 4, 16, 16), (4, 16, 16)),
    ],
    ids=str,
)
def test_pairs_rows_like_broadcasting(cond_shape, uncond_shape, dtype, operands):
    cond, uncond = normal(*cond_shape, dtype=dtype), normal(*uncond_shape, seed=1, dtype=dtype)
    rows = reduce_rows(cond, uncond, operands)
    uncond = uncond.reshape(uncond_shape[-len(cond_shape) :])  # a latent with one leading 1 too many
    assert_truth(rows, cond, uncond, operands, dtype)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    shared=st.integers(0, 3),
    latent=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    operands=st.sampled_from(reduction.OPERANDS),
)
def test_any_shapes(lead, shared, latent, operands):
    cond = normal(*lead, *latent)
    uncond = normal(*lead[max(0, len(lead) - shared) :], *latent, seed=1)
    rows = reduce_rows(cond, uncond, operands)
    assert_truth(rows, cond, uncond, operands)
    assert (np.abs(rows.channel) <= 1).all() and (np.abs(rows.flat) <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_torch_through_dlpack(dtype):
    cond = torch.randn(3, 2, 4, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    uncond = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_truth(reduce_rows(cond, uncond), cond.double().numpy(), uncond.double().numpy())


def test_torch_strides_and_offsets():
    base = torch.randn(6, 9, 9, 8, generator=torch.Generator().manual_seed(0))
    cond, uncond = base.permute(0, 3, 1, 2)[1::2, ::2], base.permute(0, 3, 1, 2)[0, 1::2]
    assert_truth(reduce_rows(cond, uncond), cond.double().numpy(), uncond.double().numpy())
    expanded = uncond[:, :1, :1].expand(3, 4, 9, 9)
    assert_truth(reduce_rows(cond, expanded), cond.double().numpy(), expanded.double().numpy())


def test_numpy_views_and_byte_order():
    cond, uncond = normal(6, 4, 9, 9)[::-2], normal(4, 9, 18, seed=1)[:, :, ::2]
    assert_truth(reduce_rows(cond, uncond), cond, uncond)
    assert_truth(reduce_rows(cond.astype(">f4"), uncond.astype(">f4")), cond, uncond)


def test_bfloat16_arrays_of_ml_dtypes():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    cond, uncond = normal(2, 4, 8, 8).astype(bfloat16), normal(4, 8, 8, seed=1).astype(bfloat16)
    assert_truth(reduce_rows(cond, uncond), cond.astype(np.float64), uncond.astype(np.float64), dtype="bfloat16")
    crossed = cond.transpose(0, 1, 3, 2)
    assert_truth(reduce_rows(crossed, uncond), crossed.astype(np.float64), uncond.astype(np.float64), dtype="bfloat16")


class OldCapsule:
    """A library from before DLPack 1.0."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self):
        return self.tensor.__dlpack__()


def test_both_kinds_of_capsule():
    tensor = torch.arange(24.0).reshape(2, 3, 2, 2)
    for owner in (tensor, OldCapsule(tensor)):
        read = dlpack.read(owner, "x")
        assert (read.pointer, read.shape, read.strides, read.dtype) == (
            tensor.data_ptr(),
            (2, 3, 2, 2),
            (12, 4, 2, 1),
            "float32",
        )
        array = read.array()
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, tensor.numpy())


def test_lazily_negated_torch_tensors():
    """c.conj().imag shares c's memory, with a bit that says that its values are negated."""
    whole = torch.complex(*(torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(n)) for n in (0, 1)))
    cond, uncond = whole.conj().imag, whole.real[0]
    assert cond.is_neg()
    for lazy in (cond, cond.transpose(2, 3)):
        assert_truth(reduce_rows(lazy, uncond), lazy.double().resolve_neg().numpy(), uncond.double().numpy())


def test_memory_that_begins_within_an_element():
    cond, uncond = normal(2, 4, 9, 9), normal(4, 9, 9, seed=1)
    buffer = bytearray(b"\0" + cond.tobytes())
    packed = np.empty(cond.shape, dtype=[("flag", "i1"), ("value", "f4")])
    packed["value"] = cond
    for odd in (
        np.frombuffer(buffer, np.float32, offset=1).reshape(cond.shape),
        torch.frombuffer(buffer, dtype=torch.float32, offset=1).reshape(cond.shape),
        packed["value"],
    ):
        assert_truth(reduce_rows(odd, uncond), cond, uncond)


SHAPE = (3, 2, 4, 6, 5)  # of what the views below are views of: rows, rows, C, H, W


@st.composite
def views(draw):
    """A view of random values, and the library it is passed in."""
    library = draw(st.sampled_from(["numpy", "torch"]))
    dtype = draw(st.sampled_from(["float32", "float16", "float64", *(["bfloat16"] if library == "torch" else [])]))
    steps = [draw(st.sampled_from((1, 2) if library == "torch" else (1, 2, -1, -3))) for _ in SHAPE]
    starts = [draw(st.sampled_from([0, 0, 0, 1, 1, 1, 9])) if step > 0 else None for step in steps]  # 9: no values
    order = draw(st.permutations(range(5)))
    widened = draw(st.integers(0, 4)) if draw(st.booleans()) else None
    return library, dtype, tuple(map(slice, starts, [None] * 5, steps)), order, widened, draw(st.booleans())


def view_of(values, library, dtype, slices, order, widened, odd):
    """`values` seen so; `odd`: read-only and of the other byte order in NumPy, negated lazily in torch."""
    if library == "torch":
        view = torch.from_numpy(values).to(getattr(torch, dtype))[slices].permute(order)
        if widened is not None and view.shape[widened]:
            view = view.narrow(widened, 0, 1).expand(
                *(3 if axis == widened else n for axis, n in enumerate(view.shape))
            )
        return torch._neg_view(view) if odd else view
    view = values.astype(np.dtype(dtype).newbyteorder(">") if odd else dtype)[slices].transpose(order)
    if widened is not None and view.shape[widened]:
        view = np.broadcast_to(
            view.take([0], widened), [3 if axis == widened else n for axis, n in enumerate(view.shape)]
        )
    view.flags.writeable = not odd and widened is None
    return view


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(view=views(), operands=st.sampled_from(reduction.OPERANDS))
def test_any_view_of_any_library(view, operands):
    """Slices, steps back, transposes, expanded, read-only, of the other byte order, lazily negated: against float64."""
    cond, uncond = (view_of(normal(*SHAPE, seed=seed), *view) for seed in (0, 1))
    as_float64 = [
        x.double().resolve_neg().numpy() if view[0] == "torch" else x.astype(np.float64) for x in (cond, uncond)
    ]
    if 0 in cond.shape:
        with pytest.raises(InputError, match="no values"):
            reduce_rows(cond, uncond, operands)
        return
    assert_truth(reduce_rows(cond, uncond, operands), *as_float64, operands, view[1].replace("float64", "float32"))


class Capsule:
    """What says of itself what it likes: a library's DLPack struct around an array's memory."""

    def __init__(self, flags=None, version=(1, 0), said=(1, 0), **fields):
        self.array, self.said = np.full((2, 4, 8, 8), 2, np.float32), said
        self.managed = dlpack._ManagedTensorVersioned(*version, None, None, flags or 0)
        raw = dlpack._Tensor() if flags is None else self.managed.tensor
        self.label = b"dltensor" if flags is None else b"dltensor_versioned"
        shape, strides = fields.pop("shape", self.array.shape), fields.pop("strides", None)
        raw.data, raw.device, raw.dtype = self.array.ctypes.data, dlpack._Device(1, 0), dlpack._DataType(2, 32, 1)
        raw.ndim = len(shape or ())
        self.kept = [(ctypes.c_int64 * len(sizes))(*sizes) if sizes else None for sizes in (shape, strides)]
        raw.shape, raw.strides = (ctypes.cast(kept, ctypes.POINTER(ctypes.c_int64)) for kept in self.kept)
        for field, value in fields.items():
            setattr(raw, field, value)
        self.struct = self.managed if flags is not None else raw

    def __dlpack_device__(self):
        return self.said

    def __dlpack__(self, **_):
        new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(("PyCapsule_New", ctypes.pythonapi))(ctypes.addressof(self.struct), self.label, None)


def test_capsules_that_are_true():
    uncond = np.ones((4, 8, 8), np.float32)
    backwards = {"strides": (256, 64, -8, -1), "byte_offset": 63 * 4}
    alone = {"shape": (2, 1, 4, 8, 8), "strides": (256, 2**62, 64, 8, 1)}  # any stride, where there is one
    assert reduce_rows(Capsule(**alone), uncond).norm.tolist() == [[16], [16]]
    for capsule in (Capsule(), Capsule(0), Capsule(flags=7, version=(1, 9)), Capsule(**backwards)):
        assert reduce_rows(capsule, uncond).norm.tolist() == [16, 16]


class Raising:
    """A library whose methods raise what they like, over several lines."""

    def __init__(self, device=(1, 0), capsule=None):
        self.device, self.capsule = device, capsule

    def __dlpack_device__(self):
        if self.device is None:
            raise ZeroDivisionError("no device.\nAnd more about it")
        return self.device

    def __dlpack__(self, **_):
        if self.capsule is None:
            raise KeyError
        return self.capsule

    @property
    def __cuda_array_interface__(self):
        raise LookupError("not now")


class Asked:
    @property
    def __dlpack_device__(self):
        raise LookupError("not now")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Capsule(data=0), r"\(2, 4, 8, 8\) and no memory: pass"),
        (Capsule(shape=None, ndim=-1), "has -1 dimensions or no shape: give"),
        (Capsule(shape=None, ndim=3), "has 3 dimensions or no shape: give"),
        (Capsule(ndim=2**31 - 1), "has 2147483647 dimensions"),
        (Capsule(shape=(1,) * 62 + (4, 8, 8)), "has 65 dimensions"),
        (Capsule(shape=(1, 4, -8, 8)), "with a size below 0: its library describes it wrongly"),
        (Capsule(shape=(1, 4, 2**60, 8)), "addresses that no memory has: its library"),
        (Capsule(shape=(2**62, 4, 8, 8), strides=(0, 64, 8, 1)), "addresses that no memory has: its library"),
        (Capsule(strides=(2**61, 1, 1, 1)), "addresses that no memory has"),
        (Capsule(strides=(-(2**61), 1, 1, 1)), "addresses that no memory has"),
        (Capsule(byte_offset=2**63), "addresses that no memory has"),
        (Capsule(dtype=dlpack._DataType(2, 32, 2)), "DLPack type code 2 with 32 bits: convert"),
        (Capsule(dtype=dlpack._DataType(6, 8, 1)), "DLPack type code 6 with 8 bits: convert"),
        (Capsule(flags=8), "DLPack flags 0x8, which are not known here: pass"),
        (Capsule(flags=0, version=(2, 0)), "comes as DLPack 2"),
        (Capsule(device=dlpack._Device(2, 0)), "on one device and is exported from another .DLPack type 2, number 0"),
        (Capsule(device=dlpack._Device(9, 0)), "that is not an NVIDIA GPU"),
        (Capsule(said=("a", "b")), "through DLPack .'str' object cannot be interpreted as an integer.: pass a NumPy"),
        (Capsule(said=(1,)), "cannot be read through DLPack"),
        (Raising(device=None), r"cannot be read through DLPack \(no device\): pass a NumPy array\."),
        (Raising(), r"cannot be read through DLPack \(KeyError\): pass"),
        (Raising(capsule=5), r"cannot be read through DLPack \(PyCapsule_GetName .*\): pass"),
        (Asked(), r"cannot be asked for its values \(not now\): pass a NumPy array\."),
        (torch.ones(2, 4, 8, 8, device="meta"), "cannot be read through DLPack .*meta"),
        (torch._efficientzerotensor((2, 4, 8, 8)), "no memory: pass a tensor that holds its values"),
        (torch.ones(2, 4, 8, 8).to_mkldnn(), "cannot be read through DLPack"),
        (torch.ones(2, 4, 8, 8, dtype=torch.complex64).conj(), "cannot be read through DLPack .*conjugate bit"),
        (torch.ones(2, 4, 8, 8).as_subclass(type("Scaled", (torch.Tensor,), {})), "is a Scaled, which can mean more"),
        (torch.ones(2, 4, 8, 8, dtype=torch.bool), "DLPack type code 6 with 8 bits: convert"),
        (np.ma.masked_array(np.ones((2, 4, 8, 8), np.float32), True), "cond has a mask.*pass an array without one"),
        (np.ma.masked_array(np.ones((2, 4, 8, 8), np.float32)), "cond has a mask"),
        (np.ones((2, 4, 8, 8), np.float32).view(type("Metres", (np.ndarray,), {})), "is a Metres, which can mean more"),
        (np.ones((2, 4, 8, 8), np.longdouble), "convert it to float32"),
        (np.ones((2, 4, 8, 8), bool), "cond is bool: convert"),
        (np.ones((2, 4, 8, 8), "m8[s]"), r"cond is timedelta64\[s\]: convert"),
    ],
)
def test_what_may_mean_something_else_is_refused(tensor, message):
    with pytest.raises(InputError, match=message) as found:
        reduce_rows(tensor, np.ones((4, 8, 8), np.float32))
    assert "\n" not in str(found.value)


def test_float64_keeps_its_digits():
    """Narrowed to float32, these differences would be 0 or half wrong."""
    uncond = normal(4, 8, 8, dtype=np.float64)
    for tiny in (1e-9, 1e-7):
        cond = uncond + tiny * normal(3, 4, 8, 8, seed=1, dtype=np.float64)
        assert_truth(reduce_rows(cond, uncond), cond, uncond)


def test_memory_outlives_the_tensor():
    array = dlpack.read(torch.full((1, 64, 64), 3.0), "x").array()
    torch.full((1, 64, 64), 5.0)  # would land in freed memory
    assert (array == 3).all()


def test_zero_guidance():
    cond = normal(2, 4, 8, 8)
    rows = reduce_rows(cond, cond)
    assert not rows.norm.any() and not rows.channel.any() and not rows.flat.any()


def test_threads_do_not_change_results():
    cond, uncond = normal(64, 4, 64, 64), normal(4, 64, 64, seed=1)
    one, many = reduce_rows(cond, uncond, threads=1), reduce_rows(cond, uncond, threads=8)
    np.testing.assert_array_equal(one.norm, many.norm)
    np.testing.assert_array_equal(one.channel, many.channel)


@pytest.mark.parametrize("operands", reduction.OPERANDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("latent", [(4, 8, 8), (3, 5, 7), (300, 20, 20)], ids=str)
def test_an_index_pairs_any_rows(latent, dtype, operands):
    cond, uncond = normal(6, *latent, dtype=dtype), normal(3, *latent, seed=1, dtype=dtype)
    row = np.array([2, 2, 0, 1, 0, 2])
    out = reduce_indexed(cond, uncond, row, operands, None)
    assert out.shape == (3, 6) and out.dtype == np.float64
    assert_truth(reduction.RowStatistics(*out), cond, uncond[row], operands, dtype.replace("float64", "float32"))
    expected = reduce_rows(cond, uncond[row], operands)
    np.testing.assert_array_equal(out, [expected.norm, expected.channel, expected.flat])


def test_an_index_may_leave_uncond_rows_out_and_be_strided():
    cond, uncond = normal(2, 4, 8, 8), normal(5, 4, 8, 8, seed=1)
    out = reduce_indexed(cond, uncond, np.array([4, 0, 1, 0])[::2], "uncond_delta", 1)
    assert_truth(reduction.RowStatistics(*out), cond, uncond[[4, 1]])


def test_rows_that_are_not_finite_leave_the_others_alone():
    cond, uncond = normal(4, 4, 8, 8), normal(3, 4, 8, 8, seed=1)
    row = np.array([0, 1, 2, 1])
    clean = reduce_indexed(cond, uncond, row, "uncond_delta", None)
    cond[0, 1, 2, 3], uncond[2, 0, 0, 0] = np.inf, np.nan
    out = reduce_indexed(cond, uncond, row, "uncond_delta", None)
    assert np.isnan(out[:, [0, 2]]).all()
    np.testing.assert_array_equal(out[:, [1, 3]], clean[:, [1, 3]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 3], "from 0 to 3: uncond has rows 0 to 2"),
        ([-1, 0], "from -1 to 0: uncond"),
        ([0], r"row \(1,\) int64: give"),
        ([[0, 0]], r"row \(1, 2\) int64: give"),
        (np.zeros(2, np.int32), r"row \(2,\) int32: give"),
    ],
)
def test_an_index_is_checked(row, message):
    with pytest.raises(InputError, match=message):
        reduce_indexed(normal(2, 4, 8, 8), normal(3, 4, 8, 8), np.asarray(row), "uncond_delta", None)


def test_an_index_needs_arrays_that_fit():
    row = np.zeros(2, np.int64)
    with pytest.raises(InputError, match="must be the same"):
        reduce_indexed(normal(2, 4, 8, 8), normal(3, 4, 8, 7), row, "uncond_delta", None)
    with pytest.raises(InputError, match=r"give \[R, C, H, W\]"):
        reduce_indexed(normal(2, 4, 8, 8), normal(4, 8, 8), row, "uncond_delta", None)
    with pytest.raises(InputError, match="no operands"):
        reduce_indexed(normal(2, 4, 8, 8), normal(3, 4, 8, 8), row, "delta", None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("operands", reduction.OPERANDS)
def test_not_finite_is_an_error(value, dtype, operands):
    for side in range(2):
        inputs = [normal(3, 4, 5, 5, dtype=dtype), normal(3, 4, 5, 5, seed=1, dtype=dtype)]
        inputs[side][1, 3, 4, 4] = value
        with pytest.raises(NotFiniteError, match=r"1 of 3 .*row 1"):
            reduce_rows(*inputs, operands)


def test_float64_too_large_to_square_is_an_error():
    cond = np.full((1, 4, 2, 2), 1e300)
    with pytest.raises(NotFiniteError):
        reduce_rows(cond, cond)


class OnDevice:
    def __dlpack_device__(self):
        return (99, 0)

    def __dlpack__(self, **_):
        raise AssertionError("a device's memory must not be touched")


LATENT = np.zeros((4, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("cond", "uncond", "message"),
    [
        ([[[1.0]]], LATENT, "cond is a list: pass"),
        (None, LATENT, "cond is a NoneType"),
        (LATENT.astype(np.int32), LATENT, "cond is int32: convert"),
        (LATENT.astype(object), LATENT, "cond is object: convert"),
        (LATENT, LATENT.astype(np.complex64), "uncond is complex64"),
        (LATENT, LATENT.astype(np.float16), "cond is float32 and uncond is float16"),
        (LATENT, LATENT.astype(np.float64), "cond is float32 and uncond is float64"),
        (LATENT[0], LATENT, r"cond has shape \(8, 8\)"),
        (LATENT, np.zeros((), np.float32), r"uncond has shape \(\)"),
        (np.zeros((0, 4, 8, 8), np.float32), LATENT, "no values"),
        (np.zeros((2, 4, 0, 8), np.float32), np.zeros((4, 0, 8), np.float32), "no values"),
        (LATENT, LATENT[:, :, :7], "must be the same"),
        (np.zeros((4, 4, 8, 8), np.float32), np.zeros((2, 4, 8, 8), np.float32), "must end cond's"),
        (LATENT, np.zeros((2, 4, 8, 8), np.float32), "must end cond's"),
        (np.zeros((2, 1, 4, 8, 8), np.float32), np.zeros((2, 1, 1, 4, 8, 8), np.float32), "must end cond's"),
        (OnDevice(), LATENT, r"cond is on a device \(DLPack type 99\) that is not an NVIDIA GPU"),
        (torch.zeros(4, 8, 8, requires_grad=True), LATENT, r"requires gradients.*cond\.detach\(\)"),
        (torch.zeros(4, 8, 8, dtype=torch.int64), LATENT, "64 bits: convert"),
        (torch.zeros(4, 8, 8, dtype=torch.complex64), LATENT, "convert"),
        (torch.zeros(4, 8, 8).to_sparse(), LATENT, "through DLPack"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(cond, uncond, message):
    with pytest.raises(InputError, match=message):
        reduce_rows(cond, uncond)


def test_options_are_checked():
    with pytest.raises(InputError, match="no operands 'delta'"):
        reduce_rows(LATENT, LATENT, "delta")
    with pytest.raises(InputError, match="threads is 0"):
        reduce_rows(LATENT, LATENT, threads=0)


def test_status_says_what_runs_and_why(path):
    status = core_status()
    assert status.path == path
    assert status.reason
    assert status.cuda_targets == (reduction.core.CUDA_TARGETS if path == "native" else None)
    assert status.cuda is (status.cuda_targets is not None)
    if path == "native":
        assert status.isa == status.isas[-1] and status.compiler


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"MEMEDGE_NO_CORE": "1"}, "numpy MEMEDGE_NO_CORE=1 is set"), ({"MEMEDGE_NO_CORE": "0"}, None)],
)
def test_environment_forces_numpy_and_nothing_loads_torch(environment, expected):
    code = (
        "import sys, numpy as np\n"
        "from memedge.engine.reduction import core_status, reduce_rows\n"
        "x = np.ones((2, 4, 8, 8), np.float32)\n"
        "assert reduce_rows(2 * x, x).norm.tolist() == [16.0, 16.0]\n"
        "assert 'torch' not in sys.modules\n"
        "s = core_status(); print(s.path, s.reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if expected:
        assert done.stdout.strip() == expected
