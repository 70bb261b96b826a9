"""What the monitor adds to a step of Stable Diffusion 1.4's size: time and memory.

    python bench/monitor_overhead.py [--calls 5] [--device cpu] [--dtype float32]

The UNet has the published configuration and random weights. Each call is of two rows, as a sampler with classifier-free
guidance makes it for one image of 512 × 512. The monitor's time is that within the UNet's hook, from the call's end
until the pipeline goes on; medians over the calls after the first. Memory is what is kept from one step to the next.
"""

import argparse
import time
from types import SimpleNamespace

import numpy as np
import torch
from architectures import ARCHITECTURES
from diffusers import UNet2DConditionModel

from memedge import Monitor
from memedge.integrations.denoiser_calls import DenoiserCall, DenoiserCalls
from memedge.integrations.monitoring import MONITOR, feed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    unet = UNet2DConditionModel(**ARCHITECTURES["sd1"].unet).to(arguments.device, dtype).eval()
    sample, states = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
    sample, states = (tensor.to(arguments.device, dtype) for tensor in (sample, states))
    monitor, inside = Monitor(), []

    def watch(call: DenoiserCall) -> None:
        start = time.perf_counter()
        feed(monitor, call)
        inside.append(time.perf_counter() - start)

    calls = []
    with torch.no_grad(), DenoiserCalls(SimpleNamespace(unet=unet), 1, 1, MONITOR, [watch]):
        for timestep in range(arguments.calls):
            start = time.perf_counter()
            unet(sample, timestep, encoder_hidden_states=states, return_dict=False)
            calls.append(time.perf_counter() - start)
    added, whole = np.median(inside[1:]), np.median(calls[1:])
    values = 4 * 64 * 64
    print(
        f"the monitor {1e3 * added:.2f} ms of a step of {whole:.2f} s: {added / whole:.4%}; kept between steps, for "
        f"each image: {4 * (2 * values + 64 * 64) / 1024:.0f} KiB; {arguments.device}, {arguments.dtype}, one thread"
    )


if __name__ == "__main__":
    main()
