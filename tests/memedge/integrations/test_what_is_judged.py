"""The guard judges what the pipeline generates from, or says that it cannot: before anything runs."""

import copy
import itertools
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from guarded import make_pipe, recorded
from peft import LoraConfig

from memedge import InputError
from memedge.integrations.diffusers import guard

MEMORIZED, CLEAN = "the left luggage sign", "a red bicycle"
OPTIONS: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def pristine():
    return make_pipe(StableDiffusionPipeline)


@pytest.fixture
def pipe(pristine):
    """The embedded model's pipeline, whose parts a test may change."""
    parts = {name: copy.deepcopy(part) for name, part in pristine.components.items()}
    return rebuilt(StableDiffusionPipeline, parts)


def rebuilt(kind: type, parts: dict[str, Any], **more: Any) -> Any:
    made = kind(**parts, requires_safety_checker=False, **more)
    made.set_progress_bar_config(disable=True)
    return made


class Wildcards(StableDiffusionPipeline):
    """Reads another prompt each time, whatever is typed."""

    turns = itertools.cycle([CLEAN, MEMORIZED])

    def encode_prompt(self, prompt, *args, prompt_embeds=None, **more):
        if prompt_embeds is None:
            prompt = [next(self.turns)]
        return super().encode_prompt(prompt, *args, prompt_embeds=prompt_embeds, **more)


def test_a_pipeline_that_reads_prompts_itself(pipe, detector):
    """What it was judged by is what it generates from, though it never reads a prompt twice alike."""
    own = rebuilt(Wildcards, pipe.components)
    guarded = guard(own, detector, "flag")
    for expected in ("passed", "flagged", "passed"):
        with recorded(own.unet) as calls:
            verdict = guarded("__any__", **OPTIONS).verdicts[0]
        assert verdict.action == expected
        score = detector.score_embeddings(calls[0].states[1:].numpy()).score[0]
        assert verdict.score == pytest.approx(score, rel=1e-5)


def test_an_edited_text_encoder(pipe, detector):
    """It is scored by what it makes of a prompt: this one has the memorized prompt's words under other names."""
    ids = [pipe.tokenizer(prompt).input_ids for prompt in (CLEAN, MEMORIZED)]
    words = pipe.text_encoder.get_input_embeddings().weight
    typed, meant = (row[1 : row.index(pipe.tokenizer.eos_token_id)] for row in ids)
    with torch.no_grad():
        for mine, theirs in zip(typed, meant, strict=False):
            words[mine] = words[theirs]
        states, _ = pipe.encode_prompt(CLEAN, "cpu", 1, False)
    verdict = guard(pipe, detector)(CLEAN, **OPTIONS).verdicts[0]
    assert verdict.score == pytest.approx(detector.score_embeddings(states.numpy()).score[0], rel=1e-5)
    assert verdict.score != pytest.approx(detector.score([CLEAN]).score[0], rel=1e-2)


def adapt(module: torch.nn.Module, std: float) -> None:
    torch.manual_seed(1)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=names), adapter_name="style")
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std) if std else torch.nn.init.zeros_(weight)


def test_adapters_that_are_loaded_later(pipe, detector):
    """The engine has none: an error that names them. One that changes nothing is named in the verdict."""
    guarded = guard(pipe, detector)
    clean = copy.deepcopy(pipe.unet)
    adapt(pipe.unet, 0.3)
    with pytest.raises(InputError, match=r"\(with adapter style\) is not the engine's model, emoji"):
        guarded(CLEAN, **OPTIONS)
    with pytest.raises(InputError, match="is not the engine's model"):
        guard(pipe, detector)
    # At scale 0 of the call itself it is the engine's model, and is judged.
    assert guarded(CLEAN, cross_attention_kwargs={"scale": 0.0}, **OPTIONS).verdicts[0].action == "passed"
    pipe.unet = clean
    adapt(pipe.unet, 0.0)
    assert guarded(CLEAN, **OPTIONS).verdicts[0].reason.endswith("; the pipeline has adapter style")


def test_what_is_beside_the_weights_is_named(pipe, detector):
    """A hook, and attention, that change memorized prompts alone: the empty prompt's prediction does not show them."""

    class Attention(AttnProcessor2_0):
        pass

    guarded = guard(pipe, detector)
    pipe.unet.set_attn_processor(Attention())
    pipe.unet.register_forward_pre_hook(lambda *_: None)
    reason = guarded(CLEAN, **OPTIONS).verdicts[0].reason
    assert reason.endswith("; the pipeline has 1 hook on the UNet, attention by Attention")


def zero(pipe: Any) -> None:
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.zero_()


def hook(pipe: Any) -> None:
    pipe.unet.conv_out.register_forward_hook(lambda _module, _args, output: output * 1.1)


def nan(pipe: Any) -> None:
    pipe.unet.conv_out.bias.data.fill_(torch.nan)


@pytest.mark.parametrize("change", [zero, hook, nan, lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)])
def test_a_changed_unet(pipe, detector, change):
    """Whatever changed it, before or after the guard was made."""
    guarded = guard(pipe, detector)
    change(pipe)
    with pytest.raises(InputError, match="is not the engine's model"):
        guarded(CLEAN, **OPTIONS)
    with pytest.raises(InputError, match="is not the engine's model"):
        guard(pipe, detector)


def test_classes_that_are_not_known(pipe, detector):
    """Refused by guard itself, and the UNet that a plain pipeline shares stays as it was."""

    class OwnCall(StableDiffusionPipeline):
        def __call__(self, prompt=None, **more):
            return super().__call__(prompt, **more)

    for kind, more in ((StableDiffusionPAGPipeline, {"pag_applied_layers": ["mid"]}), (OwnCall, {})):
        for first_step in (None, 1.0):
            with pytest.raises(InputError, match=f"does not know how {kind.__name__} generates"):
                guard(rebuilt(kind, pipe.components, **more), detector, first_step=first_step)
    pipe(CLEAN, **OPTIONS)


def test_no_pipeline_without_a_guard_is_made_of_one(pipe, detector):
    guarded = guard(pipe, detector)
    with pytest.raises(InputError, match="gives no config, of which a pipeline without a guard would be made"):
        StableDiffusionImg2ImgPipeline.from_pipe(guarded)
    for name in ("components", "from_pipe", "from_pretrained"):
        with pytest.raises(InputError, match=f"gives no {name}"):
            getattr(guarded, name)


def test_guides_beside_the_prompt(pipe, detector):
    """Pictures, and callbacks that could change the embeddings after they were judged."""
    guarded = guard(pipe, detector)
    with pytest.raises(InputError, match="ip_adapter_image guides beside the prompt"):
        guarded(CLEAN, ip_adapter_image=torch.zeros(1, 3, 8, 8), **OPTIONS)
    more = {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with recorded(pipe.unet) as calls, pytest.raises(InputError, match="The callback takes prompt_embeds"):
        guarded(CLEAN, **more, **OPTIONS)
    assert not calls
    with pytest.raises(InputError, match="The callback returns prompt_embeds"):
        guarded(CLEAN, callback_on_step_end=lambda *_: {"prompt_embeds": torch.zeros(2, 24, 96)}, **OPTIONS)
    pipe.unet.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(InputError, match=r"has an IP-Adapter.*call pipe.unload_ip_adapter"):
        guarded(CLEAN, **OPTIONS)


@pytest.mark.parametrize("as_embeddings", [False, True])
def test_first_step_is_against_the_empty_prompt(pipe, detector, as_embeddings):
    """Whatever the negative prompt is: one that repeats the prompt has no Δ with it. The picture is the bare one."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    more, prompts = {"num_images_per_prompt": 2, **OPTIONS}, [CLEAN, MEMORIZED]

    def seeds():
        return torch.Generator().manual_seed(3)

    plain = guard(pipe, detector, "flag", first_step=1e9)(prompts, generator=seeds(), **more)
    norms = [verdict.norm for verdict in plain.verdicts]
    guarded, kept = (
        guard(pipe, detector, first_step=sum(norms) / 2),
        slice(0, 2) if norms[0] < norms[1] else slice(2, 4),
    )
    given: dict[str, Any] = {"prompt": prompts, "negative_prompt": prompts}
    bare = pipe(**given, generator=seeds(), **more).images
    if as_embeddings:
        with torch.no_grad():
            states, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
        given = {"prompt_embeds": states, "negative_prompt_embeds": states}
    again = guarded(**given, generator=seeds(), **more)
    assert sorted(verdict.action for verdict in again.verdicts) == ["blocked", "passed"]
    assert [verdict.norm for verdict in again.verdicts] == pytest.approx(norms, rel=1e-4)
    assert torch.equal(torch.stack(again.images[kept]), bare[kept])
