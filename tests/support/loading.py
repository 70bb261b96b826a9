"""Loading parts of checkpoints as the export does, and comparing them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from memedge.engine.errors import ExportError
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.open import load_parts
from memedge.export.sources.parts import Parts

DEFAULTS: dict[str, Any] = {"revision": None, "loras": [], "allow_pickle": False, "config": None}


def load(model: object, told: list[str] | None = None, **options: Any) -> Parts:
    """Load a checkpoint; what progress is told is added to `told`."""
    with quiet():
        progress = (told if told is not None else []).append
        return load_parts(str(model), **{**DEFAULTS, **options}, progress=progress)


def refused(model: object, words: str, **options: Any) -> None:
    """Loading fails with one sentence that has these words."""
    with pytest.raises(ExportError, match=re.escape(words)) as caught:
        load(model, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text[0] != " " and text.endswith(".")


def modules(parts: Parts) -> dict[str, Any]:
    """Return the modules by their names in a pipeline."""
    return dict(zip(("unet", "text_encoder", "text_encoder_2"), [parts.denoiser, *parts.text_encoders], strict=False))


@torch.inference_mode()
def outputs(parts: Parts) -> list[torch.Tensor]:
    """Return what a prompt makes the text encoders and, with them, the UNet put out."""
    ids = torch.tensor([parts.tokenizers[0]("a star", padding="max_length").input_ids])
    encoded = [encoder(ids, output_hidden_states=True) for encoder in parts.text_encoders]
    more = {}
    if len(encoded) == 2:
        added = {"text_embeds": encoded[1].text_embeds, "time_ids": torch.arange(6.0)[None]}
        more = {"added_cond_kwargs": added}
    states = torch.cat([output.hidden_states[-1] for output in encoded], dim=-1)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [states, *more.get("added_cond_kwargs", {}).values(), parts.denoiser(sample, 500, states, **more).sample]


def assert_same(one: Parts, other: Parts) -> None:
    """Both hold modules of the same classes, weights and outputs, in float32, as the border promises."""
    for parts in (one, other):
        for module in modules(parts).values():
            assert not module.training
            assert not any(parameter.requires_grad for parameter in module.parameters())
            assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
    for name, module in modules(one).items():
        state, expected = modules(other)[name].state_dict(), module.state_dict()
        assert type(modules(other)[name]) is type(module)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
    for output, expected in zip(outputs(other), outputs(one), strict=True):
        # Not bit by bit: where weights lie in memory, which depends on the file, may choose another kernel.
        assert torch.isfinite(output).all()
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    vocabularies = [[tokenizer.get_vocab() for tokenizer in parts.tokenizers] for parts in (one, other)]
    assert vocabularies[0] == vocabularies[1]
    assert (one.scheduler, one.zeros_for_empty) == (other.scheduler, other.zeros_for_empty)


def edit_json(path: Path, **changes: Any) -> None:
    """Replace entries of a configuration file."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))
