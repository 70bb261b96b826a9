"""manifest.json: what an engine directory is, was made from, and may be trusted with."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from memedge.engine import atomic
from memedge.engine.errors import ManifestError, shown

SCHEMA = 4
FILE_NAME = "manifest.json"
LARGEST_SEED = (1 << 63) - 1
SIZE_LIMIT = 1 << 20  # bytes; a manifest is some kilobytes, and it is read before anything is verified
MOST_CLEAN_SCORES = 1000  # of a calibration: some 30 kilobytes
MOST_TAPS = 4
MOST_ENCODERS = 3

Precision = Literal["fp32", "fp16", "int8"]
PredictionType = Literal["epsilon", "v_prediction", "flow"]
Alignment = Literal["channel", "flat"]
Operands = Literal["uncond_delta", "cond_uncond", "cond_delta"]

# A manifest may be a stranger's: every number has a range, and text can be shown on a terminal.
Text = Annotated[str, msgspec.Meta(max_length=4096, pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*\Z")]
Word = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Real = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
Difference = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_SEED)]
Timestep = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class FileEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Size in bytes and lower-case hexadecimal SHA-256 of one file."""

    size: Count
    sha256: Sha256


class CheckpointSource(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The checkpoint: its name and the SHA-256 over its weight files."""

    id: Text
    sha256: Sha256


class Conformal(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where the alignment of prompts like the calibration's lies, but for a share δ of them.

    See memedge/calibration/conformal.py.
    """

    lowest: Real
    highest: Real
    delta: Real = msgspec.field(name="epsilon")
    prompts: Count


class PromptList(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a calibration was fitted to: a file's name, the SHA-256 of its bytes, and how many prompts of it were used.

    A list given in Python has the SHA-256 of the .txt file with a prompt on each line. Prompts count once, and not if
    they are in the other list too.
    """

    name: Text
    sha256: Sha256
    prompts: Count


class Estimate(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A share, and both ends of its 95 % interval."""

    value: Real
    lowest: Real
    highest: Real


class CrossValidation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How well prompts are told apart by what was fitted to others like them (memedge/calibration/fitting.py).

    `tpr` and `fpr` are those at the threshold that was fitted to the others for the calibration's `target_fpr`.
    """

    folds: Count
    seed: Count
    auc: Estimate
    tpr: Estimate
    fpr: Estimate


class Gain(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the alignment adds to the cross-validated AUC of the norm alone, and the standard error of that."""

    value: Real
    error: Difference

    @property
    def pays(self) -> bool:
        """Whether the alignment is worth its passes: it adds more than chance alone commonly would."""
        return self.value > self.error


class Tap(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where the screen may read a prompt's first effects (export/graphs/screen.py).

    Attributes:
        value: its name in the UNet's graph.
        shape: of one row: tokens and channels, or channels, height and width.
        flops: of one row up to it, after the cached prefix.
    """

    value: Text
    shape: Annotated[tuple[int, ...], msgspec.Meta(min_length=2, max_length=3)]
    flops: Count

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return self.shape[-1] if len(self.shape) == 2 else self.shape[0]


class Screen(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A prompt is clean if weights · change + intercept < cut, with its change at a tap (docs/methods.md §5).

    Of memorized prompts like the calibration's that the full rule finds, at most a share `alpha` is passed as clean.

    Attributes:
        tap: which of the manifest's, from 1.
        weights: one for each channel.
        intercept: in the score's unit, as the read-out is.
        cut: the lowest read-out that is not passed.
        alpha: the share, k / (memorized + 1) for the k-th lowest read-out.
        memorized: m, the prompts that the cut was set by.
        auc: how well the read-out tells the tenth of the clean prompts with the highest scores from the others, each
            by what was fitted to the other folds.
        decided: the share of clean prompts below the cut, each by the other folds' fit, with its exact 95 % interval.
    """

    tap: Count
    weights: tuple[Real, ...]
    intercept: Real
    cut: Real
    alpha: Real
    memorized: Count
    auc: Real
    decided: Estimate


class Calibration(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """score = gamma_norm · norm + gamma_alignment · alignment; memorized if score ≥ threshold (docs/methods.md §1).

    It holds for one backend and precision, one kind of alignment and one pair of cosine operands. At most a share
    `target_fpr` of the clean prompts that it was fitted to reach the threshold; half of them have a score of at most
    `clean_score`, None in engines that were calibrated before it was stored. `clean_scores` are the highest of their
    scores, descending, at most MOST_CLEAN_SCORES of them: thresholds for other rates come from these; None likewise.
    `strength` is scikit-learn's C, the inverse of the regularisation's. A score that is higher by `scale` has e-fold
    the odds of "memorized"; None likewise. `gain` is why the alignment has a weight, or none; None likewise. `screen`
    is None where there is none, and `no_screen` says in a sentence why. `date` is in UTC, as in ISO 8601.
    """

    gamma_norm: Real
    gamma_alignment: Real
    threshold: Real
    alignment: Alignment
    operands: Operands
    target_fpr: Real
    memorized: PromptList
    clean: PromptList
    strength: Real
    cross_validation: CrossValidation
    date: Text
    fitted_by: Text
    conformal: Conformal | None = None
    clean_score: Real | None = None
    clean_scores: tuple[Real, ...] | None = None
    scale: Annotated[float, msgspec.Meta(gt=0, le=1e15)] | None = None
    gain: Gain | None = None
    screen: Screen | None = None
    no_screen: Text = ""


class Preset(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The γ that the paper's authors released for a model family (docs/methods.md §1): published, not fitted here.

    With it there are scores, which order prompts, and no threshold, so no verdicts.
    """

    family: Text
    gamma_norm: Real
    gamma_alignment: Real


class Schedule(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """DDIM's steps from noise to image: the timesteps, descending, and ᾱ at each of them and after the last one."""

    timesteps: tuple[Timestep, ...]
    alphas_cumprod: tuple[Real, ...]
    final_alpha_cumprod: Real


class Flow(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How a flow-matching model's sampler spreads its noise levels σ, at the engine's own size (docs/methods.md §9).

    Attributes:
        shift: of σ to shift · σ / (1 + (shift − 1) · σ); None where it goes by the size.
        mu: the shift that goes by the size, a logarithm if `time_shift` is "exponential"; None where it does not.
        time_shift: how mu shifts.
        terminal: the last σ that the schedule is stretched to; None where it is not.
        sigmas: of as many steps as the pipeline takes where nobody says, descending, without the last one, 0.
    """

    shift: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None
    mu: Real | None
    time_shift: Literal["exponential", "linear"]
    terminal: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None
    sigmas: tuple[Annotated[float, msgspec.Meta(gt=0, le=1)], ...]


class Parity(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Largest differences from torch in fp32 over the export's probe prompts.

    Of fp16 engines: the larger of ONNX Runtime's on the CPU and those that a GPU's rounding makes
    (export/precision/simulate_fp16.py).
    """

    epsilon_relative: Difference
    norm_relative: Difference
    alignment_absolute: Difference
    score_absolute: Difference


class Drift(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How far an int8 engine's scores, with γ = (1, 1), are from the same engine's in float32, over some prompts.

    `auc_change` is None where it was not known which prompts are memorized.
    """

    score_absolute: Difference
    spearman: Real
    auc_change: Real | None
    prompts: Count


class Flops(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Floating-point operations, twice the multiply-adds of convolutions, matrix products and attention.

    Of one prompt in the text encoder, and of one row in the UNet: as the checkpoint has it, what the cached prefix
    spares, and what is left to run (folding upsampling into convolutions spares more).
    """

    text_encoder: Count
    unet: Count
    prefix: Count
    remaining: Count


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The manifest of schema 4.

    `timesteps` and `alphas_cumprod` are (t_norm, t_cos) and ᾱ at both; `schedule` has all steps
    that both are taken from. `calibrations` is keyed by
    "<provider>-<precision>"; an engine without a calibration for what runs gives no verdicts. `cached` names the UNet's
    cached inputs and the shape of one row of each (export/graphs/prefix_split.py). `drift` is there in int8 engines.
    `preset` is there if γ was published for this kind of model. `notes` says in sentences what the export chose for
    this checkpoint that is not usual. `pooled_width` is that of the pooled states, 0 in models that have none. `taps`
    are where the screen may read, the cheapest first; each has a graph.

    A flow-matching model's `flow` says how its sampler spreads its noise levels; of others it is None. Its timesteps
    are 1000 σ, its ᾱ those of the same signal-to-noise ratio, and what the UNet's graph gives is
    v + x · [σ < 1] / (1 − σ): v at σ = 1, and ε / (1 − σ) below (docs/methods.md §9).

    `tokens` are the rows of a prompt's embeddings. `token_lengths` has the length that each tokenizer pads and cuts
    prompts to, where it is not `tokens` for all. `masked`: the last column of the embeddings is 1 at tokens that are
    there, and 0 behind them. `guidance` is the scale that a distilled model is told. `reads_prompts` is false where the
    text encoder was left out: its graph knows the empty prompt alone, and others come as embeddings.
    """

    schema: int
    source: CheckpointSource
    prediction_type: PredictionType
    latent_shape: tuple[int, int, int]
    tokens: int
    state_width: int
    timesteps: tuple[Timestep, Timestep]
    alphas_cumprod: tuple[Real, Real]
    schedule: Schedule
    draws: int
    seed: Seed
    precision: Precision
    opset: Count
    tools: dict[Word, Text]
    flops: Flops
    cached: dict[Word, Annotated[tuple[int, ...], msgspec.Meta(max_length=8)]]
    parity: Parity
    calibrations: dict[Word, Calibration]
    files: dict[str, FileEntry]
    drift: Drift | None = None
    preset: Preset | None = None
    notes: tuple[Text, ...] = ()
    pooled_width: int = 0
    flow: Flow | None = None
    token_lengths: Annotated[tuple[int, ...], msgspec.Meta(max_length=MOST_ENCODERS)] = ()
    masked: bool = False
    guidance: Real | None = None
    reads_prompts: bool = True
    taps: Annotated[tuple[Tap, ...], msgspec.Meta(max_length=MOST_TAPS)] = ()

    @property
    def states_shape(self) -> tuple[int, int]:
        """One prompt's embeddings: a row per token, and one more for the pooled state, padded with zeros, if any."""
        return (self.tokens + (self.pooled_width > 0), self.state_width)

    def lengths(self, tokenizers: int) -> tuple[int, ...]:
        """Return how many ids each of so many tokenizers makes of a prompt."""
        return self.token_lengths or (self.tokens,) * tokenizers

    def tap_share(self, number: int) -> float:
        """Return the work up to a tap, counted from 1, as a share of a row's after the prefix."""
        return self.taps[number - 1].flops / max(1, self.flops.remaining)

    @property
    def norm_factor(self) -> float:
        """What ‖Δ(t_norm)‖ is multiplied by: √ᾱ / (1 − ᾱ) for v-prediction, else 1 (docs/methods.md §1, §9)."""
        if self.prediction_type == "v_prediction":
            return velocity_norm_factor(self.alphas_cumprod[0])
        return 1.0

    @property
    def epsilon_factor(self) -> float:
        """What Δ(t_norm) of the predictions is multiplied by to be that of ε: 1, or √ᾱ for v-prediction.

        Of ε = √ᾱ v + √(1 − ᾱ) x the last term is in both halves of Δ. For flow matching it is 1: at σ = 1 the Δ of ε
        is 0, and that of v stands for it.
        """
        return math.sqrt(self.alphas_cumprod[0]) if self.prediction_type == "v_prediction" else 1.0


def key_of(provider: str, precision: str) -> str:
    """Return what calibrations, and ε_0 where it is kept, are keyed by: "<provider>-<precision>"."""
    return f"{provider}-{precision}"


def velocity_norm_factor(alpha_cumprod: float) -> float:
    """Return √ᾱ / (1 − ᾱ), which scales ‖v_c − v_0‖ (docs/methods.md §1, v-prediction)."""
    return math.sqrt(alpha_cumprod) / (1 - alpha_cumprod)


def read_manifest(folder: Path) -> Manifest:
    """Read and validate `folder`'s manifest.

    Raises:
        ManifestError: no such folder, no manifest in it, not JSON, a newer schema, a wrong field.
    """
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a directory: give the folder that `memedge export` wrote.")
    if not path.is_file():
        raise ManifestError(f"{folder} holds no {FILE_NAME}, so it is not an engine: make one with `memedge export`.")
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise ManifestError(f"{path} is larger than 1 MiB, so it is no manifest: export the engine again.")
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    return parse_manifest(content, path)


class _AnySchema(msgspec.Struct):
    schema: Any


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Return the manifest that the bytes are, whatever they are; `path` is for messages.

    Raises:
        ManifestError: not JSON, another schema, a wrong field.
    """
    try:
        schema = msgspec.json.decode(content, type=_AnySchema).schema
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ManifestError(f"{path} is not a memedge manifest (broken JSON or no schema): export again.") from None
    if type(schema) is not int or schema != SCHEMA:
        advice = "upgrade memedge" if type(schema) is int and schema > SCHEMA else "export the engine again"
        found = repr(schema) if isinstance(schema, int | str | None) else f"of type {type(schema).__name__}"
        raise ManifestError(f"{path} has schema {shown(found, 40)}, this memedge reads schema {SCHEMA}: {advice}.")
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason = shown(str(error), 200)
        raise ManifestError(f"{path} is not valid ({reason}): export the engine again.") from None
    check_values(manifest, path)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest in one step: readers see the old one or the new one, never a part.

    Raises:
        ManifestError: it holds what cannot be read again; what was there stays.
    """
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    parse_manifest(content, folder / FILE_NAME)
    atomic.write(folder / FILE_NAME, content)


def check_values(manifest: Manifest, path: Path) -> None:
    """Refuse values that no export writes, before anything is allocated by them."""
    cached = [size for shape in manifest.cached.values() for size in shape]
    lengths = manifest.token_lengths
    positive = (*manifest.latent_shape, manifest.tokens, *lengths, manifest.state_width, manifest.draws, *cached)
    calibrations = manifest.calibrations.values()
    kept = [(c.clean_scores, c.clean.prompts) for c in calibrations if c.clean_scores is not None]
    shares = [e for c in calibrations for v in [c.cross_validation] for e in (v.auc, v.tpr, v.fpr)]
    shares += [c.screen.decided for c in calibrations if c.screen]
    intervals = [c.conformal for c in calibrations if c.conformal]
    if not all(0 < v <= 1 << 16 for v in positive):
        raise ManifestError(f"{path} names a size outside 1 … 65536: export the engine again.")
    if not 0 <= manifest.pooled_width <= manifest.state_width:
        raise ManifestError(f"{path} names pooled states wider than its states: export the engine again.")
    if (manifest.prediction_type == "flow") != (manifest.flow is not None):
        raise ManifestError(f"{path} does not say how its noise levels are spread: export the engine again.")
    steps = manifest.schedule
    if not 0 < len(steps.timesteps) == len(steps.alphas_cumprod):
        raise ManifestError(f"{path} names a schedule without an ᾱ for each timestep: export the engine again.")
    if not 0 < steps.final_alpha_cumprod <= 1:
        raise ManifestError(f"{path} names a final ᾱ outside (0, 1]: export the engine again.")
    if not all(0 <= a < 1 for a in (*manifest.alphas_cumprod, *steps.alphas_cumprod)):
        raise ManifestError(f"{path} names an ᾱ outside [0, 1): export the engine again.")
    if not all(
        len(scores) == min(prompts, MOST_CLEAN_SCORES) and list(scores) == sorted(scores, reverse=True)
        for scores, prompts in kept
    ):
        raise ManifestError(f"{path} holds scores of clean prompts that no calibration keeps: calibrate it again.")
    if not all(-1 <= i.lowest <= i.highest <= 1 and 0 < i.delta < 1 for i in intervals):
        raise ManifestError(f"{path} holds an interval of alignments outside [-1, 1]: calibrate the engine again.")
    if not all(0 <= s.lowest <= s.highest <= 1 and 0 <= s.value <= 1 for s in shares):
        raise ManifestError(f"{path} holds a share of prompts outside [0, 1]: calibrate the engine again.")
    if not all(0 < v <= 1 << 16 for tap in manifest.taps for v in tap.shape):
        raise ManifestError(f"{path} names a tap of a size outside 1 … 65536: export the engine again.")
    if not all(_fits(c.screen, manifest) for c in calibrations if c.screen):
        raise ManifestError(f"{path} holds a screen that fits none of its taps: calibrate the engine again.")
    if not all(0 < c.target_fpr < 1 for c in calibrations):
        raise ManifestError(f"{path} names a false-positive rate outside (0, 1): calibrate the engine again.")


def _fits(screen: Screen, manifest: Manifest) -> bool:
    """Return whether a screen has a tap, a weight for each of its channels, and shares that are some."""
    return (
        1 <= screen.tap <= len(manifest.taps)
        and len(screen.weights) == manifest.taps[screen.tap - 1].channels
        and 0 < screen.alpha < 1
        and screen.memorized > 0
    )
