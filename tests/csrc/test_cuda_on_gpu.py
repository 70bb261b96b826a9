"""The CUDA reduction on a GPU, against the core's CPU paths, which test_guidance_stats.py proves."""

import pytest
import torch

_core = pytest.importorskip("memedge._core", reason="the native core was not built", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_core.CUDA_TARGETS is None, reason="the native core was built without nvcc"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU, or PyTorch cannot use it"),
]


def normal(dtype, *shape):
    return torch.randn(*shape).to(getattr(torch, dtype))


def arguments(cond, uncond, out, operands, row):
    """The part of the call that both cores share."""
    sizes = len(cond), len(uncond), *cond.shape[1:]
    pointers = cond.data_ptr(), uncond.data_ptr(), out.data_ptr()
    return (
        *pointers,
        str(cond.dtype).removeprefix("torch."),
        *sizes,
        operands,
    ), row.data_ptr() if row is not None else 0


def on_cpu(cond, uncond, operands="uncond_delta", row=None):
    out = cond.new_empty((3, len(cond)), dtype=float)
    positional, row_ptr = arguments(cond, uncond, out, operands, row)
    _core.guidance_stats(*positional, row_ptr=row_ptr)
    return out


def on_gpu(cond, uncond, operands="uncond_delta", row=None, out=None):
    """[3, rows] on the GPU, enqueued on the current stream and not waited for."""
    out = torch.full((3, len(cond)), -7.0, dtype=torch.float64, device="cuda") if out is None else out
    positional, row_ptr = arguments(cond, uncond, out, operands, row)
    _core.cuda_guidance_stats(*positional, torch.cuda.current_stream().cuda_stream, row_ptr=row_ptr)
    return out


def assert_close(out, expected):
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


SHAPES = [  # rows, uncond_rows, channels, pixels: vector and general path, one step and many, few channels and many
    (1, 1, 1, 1),
    (3, 1, 3, 35),
    (4, 2, 4, 64 * 64),
    (2, 2, 16, 96 * 96),
    (2, 1, 130, 333),
    (2, 1, 130, 64),
    (1, 1, 4, 300_007),
    (3000, 2, 4, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operands", ["uncond_delta", "cond_uncond", "cond_delta"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_agrees_with_the_cpu_core(dtype, operands, shape):
    rows, uncond_rows, channels, pixels = shape
    cond, uncond = normal(dtype, rows, channels, pixels), normal(dtype, uncond_rows, channels, pixels)
    assert_close(on_gpu(cond.cuda(), uncond.cuda(), operands), on_cpu(cond, uncond, operands))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_from_any_item_on(dtype):
    """Memory that starts between two multiples of 16 bytes takes the general path."""
    for offset in range(1, 9):
        cond, uncond = (normal(dtype, n * 4 * 64 + offset) for n in (3, 1))
        views = [x[offset:].view(-1, 4, 64) for x in (cond, uncond)]
        moved = [x.cuda()[offset:].view(-1, 4, 64) for x in (cond, uncond)]
        assert_close(on_gpu(*moved), on_cpu(*views))
        assert_close(on_gpu(moved[0], views[1].cuda()), on_cpu(*views))


@pytest.mark.parametrize("pixels", [64, 35])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_follows_an_index_and_never_out_of_range(dtype, pixels):
    cond, uncond = normal(dtype, 6, 4, pixels), normal(dtype, 3, 4, pixels)
    row = torch.tensor([2, 2, 0, 1, 0, 2])
    expected = on_cpu(cond, uncond, row=row)
    on_device = cond.cuda(), uncond.cuda()
    assert_close(on_gpu(*on_device, row=row.cuda()), expected)
    for position, wrong in ((1, -1), (3, 3), (4, 2**62), (5, -(2**63))):
        row[position] = wrong
        expected[:, position] = torch.nan
    assert_close(on_gpu(*on_device, row=row.cuda()), expected)
    torch.cuda.synchronize()  # would raise if something had been read out of bounds


def test_gives_no_score_to_what_is_not_finite():
    cond, uncond = normal("float32", 4, 4, 4096), normal("float32", 4, 4, 4096)
    cond[0, 3, 4095], cond[1, 0, 0], uncond[2, 1, 77] = torch.nan, -torch.inf, 1e30
    out = on_gpu(cond.cuda(), uncond.cuda()).cpu()
    assert out[:, :3].isnan().all()
    assert_close(out[:, 3], on_cpu(cond, uncond)[:, 3])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gives_equal_bits_ten_thousand_times(dtype):
    cond, uncond = normal(dtype, 4, 4, 4096).cuda(), normal(dtype, 2, 4, 4096).cuda()
    outs = torch.full((10_000, 3, 4), -7.0, dtype=torch.float64, device="cuda")
    for out in outs:
        on_gpu(cond, uncond, out=out)
    assert (outs.view(torch.int64) == outs[0].view(torch.int64)).all()
    assert_close(outs[0], on_cpu(cond.cpu(), uncond.cpu()))


def test_keeps_the_order_of_a_stream():
    """Launched right after PyTorch's own work on a side stream, which takes a while, and before more of it."""
    final, uncond = normal("float32", 8, 4, 4096).cuda(), normal("float32", 1, 4, 4096).cuda()
    slow = torch.randn(4096, 4096, device="cuda")
    cond, out = torch.zeros_like(final), torch.full((3, 8), -7.0, dtype=torch.float64, device="cuda")
    expected = on_cpu(final.cpu(), uncond.cpu())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(20):
            slow = slow @ slow.softmax(0)
        cond.copy_(final)
        on_gpu(cond, uncond, out=out)
        waited = side.query()
        cond.zero_()
        result = out.clone()
    side.synchronize()
    assert not waited  # the call came back before the work was done
    assert_close(result, expected)


def test_can_replay_it_in_a_graph():
    cond, uncond = normal("float16", 4, 4, 4096).cuda(), normal("float16", 2, 4, 4096).cuda()
    out = on_gpu(cond, uncond)  # loads the kernel, which must not happen while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = cond * 2
        on_gpu(doubled, uncond, out=out)
    for _ in range(3):
        cond.copy_(normal("float16", 4, 4, 4096))
        out.fill_(-7)
        graph.replay()
        assert_close(out, on_cpu((cond * 2).cpu(), uncond.cpu()))
    assert torch.isfinite(out).all()
