"""Outlines by their properties; SSCD's file by a stand-in of its interface."""

import numpy as np
import pytest
import torch

from memedge.audit.similarity import MEAN, SSCD, Outlines
from memedge.engine.errors import InputError


def drawing(background: tuple[int, int, int], colour: tuple[int, int, int], side: int = 64, left: int = 16):
    picture = np.full((side, side, 3), background, np.uint8)
    scale = side // 64
    picture[20 * scale : 44 * scale, left * scale : (left + 30) * scale] = colour
    return picture


def similar(a, b) -> float:
    first, second = Outlines().descriptors(a[None]), Outlines().descriptors(b[None])
    return float(first[0] @ second[0])


def test_the_same_outlines_in_other_colours_are_copies():
    one = drawing((255, 255, 255), (10, 10, 10))
    assert similar(one, one) == pytest.approx(1, abs=1e-5)
    assert similar(one, drawing((20, 20, 20), (250, 250, 0))) > 0.95
    assert similar(one, drawing((255, 255, 255), (10, 10, 10), left=30)) < 0.8


def test_other_sizes_are_scaled():
    assert similar(drawing((255, 255, 255), (0, 0, 0)), drawing((255, 255, 255), (0, 0, 0), side=256)) > 0.95


class StandIn(torch.nn.Module):
    """What SSCD's file is: normalised pictures in, vectors out."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pictures, 96).flatten(1)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_sscds_file(tmp_path):
    torch.jit.script(StandIn()).save(str(tmp_path / "sscd.pt"))  # type: ignore[no-untyped-call]
    found = SSCD(tmp_path / "sscd.pt").descriptors(
        np.stack([drawing((0, 0, 0), (0, 0, 0)), drawing((255, 0, 0), (0, 0, 0))])
    )
    assert found.shape == (2, 27)  # 288 / 96 a side, three channels
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    # Black is −mean/deviation of each channel.
    black = -torch.tensor(MEAN) / torch.tensor((0.229, 0.224, 0.225))
    torch.testing.assert_close(found[0].view(3, 9).mean(1), black / black.norm() / 3, rtol=1e-4, atol=1e-4)


def test_no_torchscript(tmp_path):
    (tmp_path / "sscd.pt").write_bytes(b"words")
    for path in (tmp_path / "sscd.pt", tmp_path / "none.pt"):
        with pytest.raises(InputError, match="cannot be read as TorchScript"):
            SSCD(path)
