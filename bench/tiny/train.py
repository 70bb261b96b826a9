"""Train the embedded model. Seeded, and resumable: run the same command again after a kill (SIGTERM saves first).

    python bench/tiny/train.py DATA_DIR OUT_DIR --samples 400000

Writes OUT_DIR/checkpoint.pt every few minutes, and at the end the diffusers-format OUT_DIR/pipeline (fp16). The
learning rate is constant, then falls linearly to zero over the last quarter of `--samples`, so a run that turns out
slow may be resumed with a smaller target.
"""

import argparse
import signal
import threading
import time
from pathlib import Path

import torch
from dataset import Emoji
from diffusers.models.attention_processor import AttnProcessor
from model import Model, scheduler
from transformers import CLIPTokenizer

BATCH = 32
LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
COOLDOWN_SHARE = 0.25
CAPTION_DROPOUT = 0.1  # the empty prompt's share: what classifier-free guidance subtracts
EMA = 0.999
LOSS_BINS = 20
CHECKPOINT_SECONDS = 240


class BinnedLoss:
    """Weights each sample by 1 / (running loss of its timestep bin).

    Unweighted, the low-noise timesteps, whose errors are ten times smaller, hardly learn (measured on a prototype).
    """

    def __init__(self) -> None:
        self.running = torch.ones(LOSS_BINS)
        self.seen = torch.zeros(LOSS_BINS)

    def __call__(self, squared_error: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        bins = timestep * LOSS_BINS // 1000
        for b, loss in zip(bins.tolist(), squared_error.tolist(), strict=True):
            self.seen[b] += 1
            rate = max(0.02, 1 / self.seen[b].item())
            self.running[b] += rate * (loss - self.running[b])
        return (squared_error / self.running[bins]).mean()


def learning_rate(step: int, steps: int) -> float:
    cooldown = max(1, int(steps * COOLDOWN_SHARE))
    return LEARNING_RATE * min(1.0, step / WARMUP_STEPS, (steps - step + 1) / cooldown)


class Training:
    """Everything a run needs to go on exactly where it stopped."""

    def __init__(self, data: Emoji, model: Model, seed: int):
        self.data, self.model = data, model
        model.unet.to(memory_format=torch.channels_last)
        model.unet.set_attn_processor(AttnProcessor())
        self.parameters = model.parameters()
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, weight_decay=1e-3, betas=(0.9, 0.99), foreach=True
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.loss = BinnedLoss()
        self.alphas = scheduler().alphas_cumprod
        self.ids = model.tokenize([c.text for c in data.captions])
        self.empty = model.tokenize([""])[0]
        self.step = 0

    def advance(self, steps: int) -> float:
        """Take one step of `steps`; return the mean squared error of the predicted noise."""
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, steps)
        index = self.data.choose(BATCH, self.generator)
        picture = self.data.to_latent(self.data.draw(index, self.generator))
        ids = self.ids[index]
        ids[torch.rand(BATCH, generator=self.generator) < CAPTION_DROPOUT] = self.empty
        noise = torch.randn(picture.shape, generator=self.generator)
        timestep = torch.randint(1000, (BATCH,), generator=self.generator)
        alpha = self.alphas[timestep][:, None, None, None]
        noisy = (alpha.sqrt() * picture + (1 - alpha).sqrt() * noise).to(memory_format=torch.channels_last)

        states = self.model.text_encoder(input_ids=ids)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = self.model.unet(noisy, timestep, states).sample
        squared_error = (predicted.float() - noise).square().mean((1, 2, 3))
        self.optimizer.zero_grad()
        self.loss(squared_error, timestep).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 2.0)
        self.optimizer.step()

        decay = min(EMA, (1 + self.step) / (10 + self.step))
        torch._foreach_mul_(self.average, decay)
        torch._foreach_add_(self.average, [p.detach() for p in self.parameters], alpha=1 - decay)
        return squared_error.mean().item()

    def save(self, path: Path) -> None:
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "running": self.loss.running,
            "seen": self.loss.seen,
            "step": self.step,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)  # a kill while writing leaves the previous checkpoint

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.set_parameters(state["parameters"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.loss.running, self.loss.seen = state["running"], state["seen"]
        self.step = state["step"]

    def set_parameters(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint.pt"

    model = Model.initialise(CLIPTokenizer.from_pretrained(arguments.data / "tokenizer"))
    training = Training(Emoji(arguments.data), model, arguments.seed)
    if checkpoint.exists():
        training.resume(checkpoint)
    steps = arguments.samples // BATCH
    saved = started = time.monotonic()
    first, total, count = training.step, 0.0, 0
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    while training.step < steps and not stopped.is_set():
        total += training.advance(steps)
        count += 1
        if training.step % 100 == 0:
            speed = (training.step - first) * BATCH / (time.monotonic() - started)
            print(f"{training.step * BATCH} samples, mean squared error {total / count:.4f}, {speed:.0f}/s", flush=True)
            total, count = 0.0, 0
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            training.save(checkpoint)
            saved = time.monotonic()
    training.save(checkpoint)
    if stopped.is_set():
        return
    training.set_parameters(training.average)
    model.save(arguments.out / "pipeline")


if __name__ == "__main__":
    main()
