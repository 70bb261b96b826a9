"""Directories that Optimum exported: read, cut and packed, their graphs give what Optimum's own pipeline gives."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from models import TOKENS, make_checkpoint
from optimum_layout import GRAPH, export_layout, make_pipeline
from torch.utils.flop_counter import FlopCounterMode

from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import ExportError
from memedge.engine.manifest import read_manifest
from memedge.engine.memory import HostMemory
from memedge.engine.ort import OrtBackend
from memedge.engine.precision import ENGINE
from memedge.engine.reduction import reduce_rows
from memedge.engine.tokenizer import PromptTokenizer
from memedge.export.export import export
from memedge.export.graphs import files
from memedge.export.parity import engine_epsilon
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.open import load_checkpoint
from memedge.export.sources.optimum import OptimumCheckpoint, is_optimum
from memedge.export.sources.torch_checkpoint import TorchCheckpoint

PROMPTS = ("", "a cat", "a", "a prompt of more bytes than there is room for", "b!")
needs_optimum = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None, reason="Optimum is not installed: it has an environment of its own"
)


@pytest.fixture(scope="module", params=["sd1", "sdxl", pytest.param("sd2", marks=pytest.mark.slow)])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(kind):
    return make_pipeline(kind)


@pytest.fixture(scope="module")
def layout(pipeline, tmp_path_factory) -> Path:
    return export_layout(pipeline, tmp_path_factory.mktemp("optimum") / "model")


@pytest.fixture(scope="module")
def engine(layout, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("optimum_engine") / "engine"
    export(layout, output)
    return output


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A directory to be changed in copies."""
    return export_layout(make_pipeline("sd1"), tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    return shutil.copytree(plain, tmp_path / "model")


def inputs(states: tuple[int, int]) -> dict[str, np.ndarray]:
    """Three rows, two prompts, one timestep."""
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((3, 4, 8, 8), np.float32),
        "timestep": np.full(3, 41),
        "states": rng.standard_normal((2, *states), np.float32),
        "prompt": np.array([1, 0, 1]),
    }


def session(model: ir.Model, path: Path) -> onnxruntime.InferenceSession:
    files.save(model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def is_xl(pipeline) -> bool:
    return getattr(pipeline, "text_encoder_2", None) is not None


@torch.no_grad()
def torch_prediction(pipeline, sample, timestep, states: np.ndarray) -> np.ndarray:
    """The UNet called as diffusers' pipelines do, for one row of packed states."""
    more = {}
    if is_xl(pipeline):
        pooled = torch.from_numpy(states[None, TOKENS, : pipeline.text_encoder_2.config.projection_dim])
        more = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    text = torch.from_numpy(states[None, :TOKENS])
    given = torch.from_numpy(sample[None]), torch.tensor(float(timestep)), text
    return pipeline.unet(*given, added_cond_kwargs=more, return_dict=False)[0][0].numpy()


@torch.no_grad()
def torch_states(pipeline) -> np.ndarray:
    """The states of PROMPTS by diffusers' own encode_prompt, packed."""
    prompts = list(PROMPTS[1:])
    if not is_xl(pipeline):
        positive, negative = pipeline.encode_prompt(prompts, "cpu", 1, True)
        return torch.cat([negative[:1], positive]).numpy()
    positive, negative, pooled, negative_pooled = pipeline.encode_prompt(prompts)
    text, last = torch.cat([negative[:1], positive]), torch.cat([negative_pooled[:1], pooled])
    row = torch.nn.functional.pad(last, (0, text.shape[2] - last.shape[1]))
    return torch.cat([text, row[:, None]], dim=1).numpy()


def test_states_are_the_pipelines(pipeline, engine):
    """Of short, long, truncated and empty prompts; SDXL's second encoder pads with its own token."""
    opened = EngineDirectory.open(engine)
    ids, _ = PromptTokenizer(opened.tokenizers, opened.token_lengths)(PROMPTS)
    text_encoder = onnxruntime.InferenceSession(engine / "text_encoder.onnx", providers=["CPUExecutionProvider"])
    found = text_encoder.run(["states"], {"ids": ids})[0]
    expected = torch_states(pipeline)
    assert found.shape[1:] == read_manifest(engine).states_shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert (found[0] == 0).all() == is_xl(pipeline)


def test_unet_takes_prompts_by_row(kind, pipeline, layout, tmp_path):
    """The whole graph, before it is split, gives for each row what torch gives; so does the reference."""
    checkpoint = OptimumCheckpoint(layout)
    states = (TOKENS + (kind == "sdxl"), checkpoint.state_width)
    feeds = inputs(states)
    rows = [(feeds["sample"][r], 41, feeds["states"][p]) for r, p in enumerate(feeds["prompt"])]
    expected = np.stack([torch_prediction(pipeline, *row) for row in rows])
    np.testing.assert_allclose(np.stack([checkpoint.predict(*row) for row in rows]), expected, rtol=1e-4, atol=1e-5)
    model = checkpoint.unet_graph()
    found = session(model, tmp_path / "unet.onnx").run(["prediction"], feeds)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_shapes_are_settled(layout):
    """Every value's shape is static but for its first dimension; keys and values are made once per prompt."""
    model = OptimumCheckpoint(layout).unet_graph()
    for node in model.graph:
        for value in node.outputs:
            assert value.shape is not None and value.dtype is not None, value
            assert all(isinstance(d, int) for d in value.shape[1:]), value
        if node.op_type == "Reshape":
            assert node.inputs[1].is_initializer()
    products = [node for node in model.graph if node.op_type == "MatMul" and str(node.outputs[0].shape[0]) == "prompts"]
    blocks = sum("attn2" in str(node.name) and node.op_type == "Softmax" for node in model.graph)
    assert len(products) == 2 * blocks > 0


def test_split_like_torchs(pipeline, engine):
    """Noise and timestep are gone, shape arithmetic too; as much is saved as of the same model read by torch."""
    graph = ir.load(engine / "unet.onnx").graph
    names = {value.name for value in graph.inputs}
    cached = {name for name in names if name.startswith("cached.")}
    assert len(cached) > 1 and names - cached == {"states", "prompt", "row"}
    assert not {node.op_type for node in graph} & {"Shape", "Expand", "Cast", "Where", "Identity", "Constant"}
    feeds = inputs(read_manifest(engine).states_shape)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        torch_prediction(pipeline, feeds["sample"][0], 41, feeds["states"][0])
    flops = read_manifest(engine).flops
    assert flops.unet == counter.get_total_flops()
    assert flops.prefix > 0 and flops.remaining < flops.unet - flops.prefix


def check_parity(engine: Path, states: np.ndarray, predict) -> tuple[float, float]:
    """Compare norms and alignments of an engine with those of ε computed elsewhere, in float64; return the largest."""
    directory = EngineDirectory.open(engine)
    manifest, sample = directory.manifest, directory.baseline.sample
    rows = [[predict(sample[0], t, state) for t in manifest.timesteps] for state in states]
    true = np.array(rows, np.float64)[:, :, None]
    delta = true[1:] - true[0]
    norm = np.sqrt((delta[:, 0] ** 2).sum((2, 3, 4))).mean(1)
    pair = torch.from_numpy(true[:1, 1]).expand(len(delta), -1, -1, -1, -1), torch.from_numpy(delta[:, 1])
    alignment = torch.cosine_similarity(*pair, dim=2).mean((1, 2, 3)).numpy()  # ε_0 with Δ over channels
    opened = EngineDirectory.open(engine)
    ids, _ = PromptTokenizer(opened.tokenizers, opened.token_lengths)(PROMPTS)
    backend = OrtBackend(engine, directory.baseline.cached, "fp32", HostMemory())
    found = engine_epsilon(backend, ids, 1)
    assert np.abs(found[0] - directory.baseline.uncond).max() == 0
    terms = reduce_rows(found[1:], found[0])
    differences = (
        float(np.abs(terms.norm[:, 0].mean(1) / norm - 1).max()),
        float(np.abs(terms.channel[:, 1].mean(1) - alignment).max()),
    )
    assert differences[0] <= ENGINE["fp32"].norm and differences[1] <= ENGINE["fp32"].alignment
    return differences


def test_engine_scores_like_torch(pipeline, engine):
    check_parity(engine, torch_states(pipeline), lambda *row: torch_prediction(pipeline, *row))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_precisions(plain, tmp_path, precision):
    manifest = export(plain, tmp_path / "engine", precision=precision)
    assert manifest.precision == precision
    operators = {node.op_type for node in ir.load(tmp_path / "engine" / "unet.onnx").graph}
    assert "Cast" in operators if precision == "fp16" else "QLinearConv" in operators


@pytest.mark.slow
def test_heads_in_the_batch(tmp_path):
    """Attention as before torch 2 multiplies the batch by its heads: exported, and counted, as the other is."""
    from diffusers.models.attention_processor import AttnProcessor

    pipeline = make_pipeline("sd1")
    pipeline.unet.set_attn_processor(AttnProcessor())
    export(export_layout(pipeline, tmp_path / "model"), tmp_path / "engine")
    feeds = inputs((TOKENS, 24))
    with FlopCounterMode(display=False) as counter:
        torch_prediction(pipeline, feeds["sample"][0], 41, feeds["states"][0])
    assert read_manifest(tmp_path / "engine").flops.unet == counter.get_total_flops()


def edit(folder: Path, part: str, change) -> Path:
    """Change a part's graph, as another exporter or another model would have it."""
    model = onnx.load(folder / part / GRAPH)
    change(model)
    onnx.save(model, folder / part / GRAPH)
    return folder


@pytest.mark.slow
def test_inputs_of_other_types(plain, copy, tmp_path):
    """Older Optimums take ids as int32, and the timestep as a vector of int64."""

    def cast(model, name, new_type, shape):
        given = next(value for value in model.graph.input if value.name == name)
        for node in model.graph.node:
            node.input[:] = [f"{name}.cast" if i == name else i for i in node.input]
        old = given.type.tensor_type.elem_type
        given.CopyFrom(onnx.helper.make_tensor_value_info(name, new_type, shape))
        node = onnx.helper.make_node("Cast", [name], [f"{name}.cast" if shape != ["steps"] else "time.float"], to=old)
        nodes = [node]
        if shape == ["steps"]:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "time.axes"))
            nodes.append(onnx.helper.make_node("Squeeze", ["time.float", "time.axes"], [f"{name}.cast"]))
        for number, added in enumerate(nodes):
            model.graph.node.insert(number, added)

    edit(copy, "text_encoder", lambda m: cast(m, "input_ids", onnx.TensorProto.INT32, ["batch_size", "length"]))
    edit(copy, "unet", lambda m: cast(m, "timestep", onnx.TensorProto.INT64, ["steps"]))
    changed, original = export(copy, tmp_path / "a"), export(plain, tmp_path / "b")
    assert changed.parity == original.parity and changed.flops == original.flops


@pytest.mark.slow
def test_external_data(plain, tmp_path):
    """Weights in a second file, as of graphs above 2 GB, give the same engine."""
    folder = shutil.copytree(plain, tmp_path / "model")
    for part in ("unet", "text_encoder"):
        model = onnx.load(folder / part / GRAPH)
        onnx.save(
            model, folder / part / GRAPH, save_as_external_data=True, location="model.onnx_data", size_threshold=0
        )
    assert export(folder, tmp_path / "a").parity == export(plain, tmp_path / "b").parity


def refused(folder: Path, tmp_path: Path, words: str) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(ExportError, match=re.escape(words)) as caught:
        export(folder, tmp_path / "engine")
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("location", ["../secret", "{absolute}", "link"])
def test_weights_elsewhere(plain, tmp_path, location):
    """Neither a path nor a link may lead out of the folder."""
    folder = shutil.copytree(plain, tmp_path / "model")
    model = onnx.load(folder / "unet" / GRAPH)
    secret = tmp_path / "model" / "secret"
    onnx.save(model, folder / "unet" / GRAPH, save_as_external_data=True, location="data", size_threshold=0)
    (folder / "unet" / "data").rename(secret)
    (folder / "unet" / "link").symlink_to(secret)
    model = onnx.load(folder / "unet" / GRAPH, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(absolute=secret)
    (folder / "unet" / GRAPH).write_bytes(model.SerializeToString())
    refused(folder, tmp_path, "has weights outside its folder")


MISSING = ("text_encoder/model.onnx", "tokenizer", "scheduler", "unet/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("part", MISSING)
def test_part_missing(copy, tmp_path, part):
    path = copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(copy, tmp_path, f"holds no {part}")


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        node.input[:] = [new if i == old else i for i in node.input]
        node.output[:] = [new if o == old else o for o in node.output]


def add_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("timestep_cond", 1, ["batch_size", 8]))


def fix_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def poison(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "unet.conv_in.weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0, 0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))


def halve(model: onnx.ModelProto) -> None:
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(weight).astype(np.float16)
            weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))


def quantise(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "MatMulInteger"


def fuse(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Erf")
    node.op_type, node.domain = "FastGelu", "com.microsoft"


def age(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 14


REFUSED = [
    ("unet", add_input, "The UNet of"),
    ("unet", fix_batch, "has a fixed batch: export it without --no-dynamic-axes"),
    ("unet", poison, "NaN or infinity in 'unet.conv_in.weight'"),
    ("unet", halve, "holds float16: export it in fp32"),
    ("text_encoder", halve, "holds float16: export it in fp32"),
    ("unet", quantise, "is quantised or optimised for one runtime (it holds MatMulInteger)"),
    ("unet", fuse, "is quantised or optimised for one runtime (it holds FastGelu)"),
    ("unet", age, "has opset 14: export it with --opset 18"),
    ("text_encoder", lambda m: rename(m, "last_hidden_state", "logits"), "memedge exports CLIP text encoders"),
]


@pytest.mark.parametrize(("part", "change", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_graphs_of_other_kinds(copy, tmp_path, part, change, words):
    refused(edit(copy, part, change), tmp_path, words)


def test_damaged_files(copy, tmp_path):
    path = copy / "unet" / GRAPH
    path.write_bytes(path.read_bytes()[:5000])
    refused(copy, tmp_path, "cannot be loaded")


def test_pointer_to_git_lfs(copy, tmp_path):
    (copy / "unet" / GRAPH).write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(copy, tmp_path, "is a git-lfs pointer")


def test_options_for_torchs_models(copy):
    for option in ({"revision": "main"}, {"loras": ["a.safetensors"]}, {"config": "b"}):
        with pytest.raises(ExportError, match="is what Optimum exported"):
            load_checkpoint(str(copy), **option)


def test_broken_json(copy, tmp_path):
    (copy / "unet" / "config.json").write_text("{")
    refused(copy, tmp_path, "cannot be loaded")


def test_inpainting(copy, tmp_path):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 9}))
    refused(copy, tmp_path, "takes 9 channels and gives 4")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("unet/config.json", {"sample_size": None}, "unet/config.json has sample_size null"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "takes an embedding of the guidance scale"),
        ("scheduler/scheduler_config.json", {"timestep_type": "continuous"}, 'has timestep_type "continuous"'),
        ("text_encoder/config.json", {"use_attention_mask": True}, "hides padding from the text encoder"),
        ("model_index.json", {"_class_name": "StableDiffusionUpscalePipeline"}, "is a StableDiffusionUpscalePipeline"),
    ],
)
def test_other_models(file, change, words, copy, tmp_path):
    """Configurations that say so, by the table that is every source's (test_check_traits.py)."""
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **change}))
    refused(copy, tmp_path, words)


def test_size_of_other_latents(copy, tmp_path):
    """A graph that the configuration's size does not fit: skip connections of odd sizes."""
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": 7}))
    refused(copy, tmp_path, "ONNX Runtime cannot run")


def test_timestep_without_rows(copy, tmp_path):
    """A time embedding that is one for all rows can't be cached by row."""

    def expand_to_one(model):
        node = next(node for node in model.graph.node if node.op_type == "Expand")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
        node.input[1] = "one"

    refused(edit(copy, "unet", expand_to_one), tmp_path, "This UNet mixes the prompt with something of the timestep")


def test_torchs_weights_come_first(checkpoint, tmp_path):
    """SDXL's repository holds an ONNX graph beside its weights: it is a diffusers directory all the same."""
    both = shutil.copytree(checkpoint, tmp_path / "both")
    (both / "unet" / GRAPH).write_bytes(b"not looked at")
    assert not is_optimum(both)
    with quiet():
        assert isinstance(load_checkpoint(str(both)), TorchCheckpoint)


def test_refiner(tmp_path):
    """SDXL's second model takes five numbers about the image, and one text encoder."""
    folder = export_layout(make_pipeline("sdxl"), tmp_path / "model")

    def shorten(model):
        given = next(value for value in model.graph.input if value.name == "time_ids")
        given.type.tensor_type.shape.dim[1].dim_value = 5

    refused(edit(folder, "unet", shorten), tmp_path, "is a refiner")


def test_torchs_directories_are_not_optimums(checkpoint, plain):
    assert is_optimum(plain) and not is_optimum(checkpoint)
    assert isinstance(load_checkpoint(str(plain)), OptimumCheckpoint)


def test_every_file_is_in_the_hash(copy):
    first = OptimumCheckpoint(copy).sha256
    (copy / "tokenizer" / "notes.txt").write_text("changed")
    assert OptimumCheckpoint(copy).sha256 != first


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory) -> Path:
    """What `optimum-cli export onnx` makes of the pipeline."""
    folder = tmp_path_factory.mktemp("cli")
    pipeline.save_pretrained(folder / "torch")
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "onnx", "--task", "text-to-image", "--model"]
    done = subprocess.run(
        [*command, folder / "torch", folder / "onnx"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "onnx"


@needs_optimum
@pytest.mark.filterwarnings("default")  # Optimum's own, and those of what it imports
def test_scores_like_optimums_pipeline(kind, exported, tmp_path, record_property):
    """`optimum-cli`'s directory as it is, against the components of the pipeline that Optimum itself makes of it."""
    from optimum.onnxruntime import ORTStableDiffusionPipeline, ORTStableDiffusionXLPipeline

    export(exported, tmp_path / "engine")
    theirs = (ORTStableDiffusionXLPipeline if kind == "sdxl" else ORTStableDiffusionPipeline).from_pretrained(exported)

    def predict(sample, timestep, states):
        more = {}
        if kind == "sdxl":
            size = theirs._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32)
            width = theirs.text_encoder_2.config.projection_dim
            more = {
                "added_cond_kwargs": {"text_embeds": torch.from_numpy(states[None, TOKENS, :width]), "time_ids": size}
            }
        text = torch.from_numpy(states[None, :TOKENS])
        return theirs.unet(torch.from_numpy(sample[None]), torch.tensor(timestep), text, **more)[0][0].numpy()

    norm, alignment = check_parity(tmp_path / "engine", torch_states(theirs), predict)
    record_property("norm, alignment", (norm, alignment))


@needs_optimum
@pytest.mark.filterwarnings("default")
def test_torchs_directory_beside_optimum(tmp_path):
    """Optimum holds diffusers and transformers back: memedge's own export has to work with those too."""
    parity = export(make_checkpoint(tmp_path / "model"), tmp_path / "engine").parity
    assert parity.norm_relative <= ENGINE["fp32"].norm and parity.alignment_absolute <= ENGINE["fp32"].alignment
