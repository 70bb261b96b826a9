"""Train UNet and text encoder on the cached latents. Run the same command again after a kill (SIGTERM saves first).

    python bench/tiny/train.py DATA_DIR OUT_DIR

Prints samples, mean squared error of the predicted noise, throughput and time left. Every few minutes it writes
OUT_DIR/checkpoint.pt, and the averaged model as a pipeline of diffusers, OUT_DIR/pipeline: any moment's model can be
looked at.
"""

from pathlib import Path

import numpy as np
import torch
from dataset import Caption, load_captions
from diffusers.models.attention_processor import AttnProcessor
from loop import Training, arguments, run
from model import Model, scheduler
from transformers import CLIPTokenizer
from transformers.utils import logging
from vae import load_vae

BATCH = 64
LEARNING_RATE = 1e-3
AVERAGE = 0.999
CAPTION_DROPOUT = 0.1  # the empty prompt's share: what classifier-free guidance subtracts
LOSS_BINS = 20


class BinnedLoss:
    """Weights each sample by 1 / (running loss of its timestep bin).

    Unweighted, the low-noise timesteps, whose errors are ten times smaller, hardly learn (measured on a prototype).
    """

    def __init__(self) -> None:
        self.running = torch.ones(LOSS_BINS)
        self.seen = torch.zeros(LOSS_BINS)

    def weights(self, timestep: torch.Tensor) -> torch.Tensor:
        return 1 / self.running[timestep * LOSS_BINS // 1000]

    def update(self, squared_error: torch.Tensor, timestep: torch.Tensor) -> None:
        bins = timestep * LOSS_BINS // 1000
        for b, loss in zip(bins.tolist(), squared_error.tolist(), strict=True):
            self.seen[b] += 1
            rate = max(0.02, 1 / self.seen[b].item())
            self.running[b] += rate * (loss - self.running[b])


class Exposures:
    """Pairs of a caption and a picture, drawn as often as the captions say."""

    def __init__(self, captions: list[Caption]):
        pairs = [(place, i, n) for place, caption in enumerate(captions) for i, n in caption.pictures]
        self.captions, self.pictures, counts = torch.tensor(pairs).T
        self.until = counts.cumsum(0)

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return indices of captions and ids of pictures, each [count]."""
        drawn = torch.randint(int(self.until[-1]), (count,), generator=generator)
        pair = torch.searchsorted(self.until, drawn, right=True)
        return self.captions[pair], self.pictures[pair]


class UNetTraining(Training):
    """`latents` are float16 [N, 4, 16, 16], by the pictures' ids; they may be memory-mapped."""

    def __init__(self, captions: list[Caption], latents: np.ndarray, model: Model, seed: int, workers: int):
        exact = [p.detach().float().clone() for p in model.parameters()]
        model.unet.bfloat16()  # measured: 1.2 x faster than autocast, which converts at each operation
        super().__init__(exact, model.parameters(), seed, BATCH, LEARNING_RATE, AVERAGE, workers)
        self.latents, self.model = latents, model
        if self.device.type == "cpu":
            model.unet.set_attn_processor(AttnProcessor())  # measured: 1.4 x faster than SDPA at these sizes
            model.text_encoder.set_attn_implementation("eager")  # SDPA's backward pass alone takes a tenth of a step
        self.exposures = Exposures(captions)
        self.bins = BinnedLoss()
        self.alphas = scheduler().alphas_cumprod
        self.ids = model.tokenize([caption.text for caption in captions])
        self.empty = model.tokenize([""])[0]

    def extra(self) -> dict[str, torch.Tensor]:
        return {"running": self.bins.running, "seen": self.bins.seen}

    def draw(self) -> tuple[torch.Tensor, ...]:
        """Return captions' ids [B, 24], latents and noise [B, 4, 16, 16], timesteps [B]."""
        caption, picture = self.exposures.draw(self.batch, self.generator)
        ids = self.ids[caption]
        ids[torch.rand(self.batch, generator=self.generator) < CAPTION_DROPOUT] = self.empty
        latent = torch.from_numpy(self.latents[picture.numpy()]).float()
        noise = torch.randn(latent.shape, generator=self.generator)
        return ids, latent, noise, torch.randint(1000, (self.batch,), generator=self.generator)

    def loss(self, *part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, latent, noise, timestep = part
        alpha = self.alphas[timestep][:, None, None, None]
        noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
        states = self.model.text_encoder(input_ids=ids.to(self.device))[0].bfloat16()
        noisy = noisy.to(self.device, torch.bfloat16)
        predicted = self.model.unet(noisy, timestep.to(self.device), states).sample
        squared_error = (predicted.float() - noise.to(self.device)).square().mean((1, 2, 3))
        return (squared_error * self.bins.weights(timestep).to(self.device)).mean(), squared_error

    def observe(self, errors: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> None:
        self.bins.update(errors, batch[-1])

    def save(self, path: Path) -> None:
        """Write the checkpoint, and beside it the averaged model."""
        super().save(path)
        averaged = Model.initialise(self.model.tokenizer, self.model.vae)
        with torch.no_grad():
            for parameter, value in zip(averaged.parameters(), self.average, strict=True):
                parameter.copy_(value)
        averaged.save(path.parent / "pipeline")


def main() -> None:
    told = arguments(__doc__, 1_800_000)
    logging.disable_progress_bar()  # one at each checkpoint
    model = Model.initialise(CLIPTokenizer.from_pretrained(told.data / "tokenizer"), load_vae(told.data / "vae"))
    model.unet.to(told.device)
    model.text_encoder.to(told.device)
    latents = np.load(told.data / "latents.npy", mmap_mode="r")
    captions = load_captions(told.data / "captions.json")
    training = UNetTraining(captions, latents, model, told.seed, told.workers)
    print(f"{sum(p.numel() for p in training.parameters)} parameters, {len(captions)} captions", flush=True)
    run(training, told.samples, told.out / "checkpoint.pt")


if __name__ == "__main__":
    main()
