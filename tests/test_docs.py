"""What pages, docstrings and comments name exists, and the examples of the pages run."""

import ast
import importlib.util
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "csrc", "deploy", "docs", "engine", "examples", "export", "memedge", "tests")
COMMENT = {".cc": "//", ".h": "//", ".cu": "//", ".cuh": "//", ".c": "//", ".sh": "#", ".toml": "#", ".yml": "#"}

# A path within the repository, or a file's name alone.
PATH = re.compile(rf"(?<![\w./~*<>-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w/*]")
NAME = re.compile(r"(?<![\w./*<>-])[\w-]+\.(?:py|cc|cu|cuh|h|sh)\b")
PAGE = re.compile(r"(?<![\w./*-])[\w./-]*[\w-]\.md\b")
SECTION = re.compile(r"§(\d+)")
DOTTED = re.compile(r"(?<![\w./-])([a-z]\w*)\.([A-Za-z_]\w*)\b(?!\.\w)")
POINTER = re.compile(r"\(([a-z]\w*)\.([A-Za-z_]\w*)\)")
SUFFIX = {"py", "cc", "cu", "h", "c", "html", "json", "npy", "npz", "png", "safetensors"}
OTHERS = {"cuda.h", "numpy.py"}  # CUDA's, and one that nobody has
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


@cache
def files() -> tuple[Path, ...]:
    """Return the repository's files of text: those of its folders, and those beside them."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    found += [path for path in ROOT.iterdir() if path.is_file()]
    return tuple(path for path in found if path.suffix in {".py", ".md", *COMMENT} and "__pycache__" not in path.parts)


def pages() -> list[Path]:
    return [path for path in files() if path.suffix == ".md"]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def texts() -> tuple[tuple[Path, str], ...]:
    """Return what people read: whole pages, docstrings, runs of comments; each with its file."""
    found = []
    for path in files():
        source = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            found.append((path, source))
        elif path.suffix == ".py":
            found += [(path, text) for text in (*docstrings(ast.parse(source)), *comments(source))]
        else:
            lines = (line.partition(COMMENT[path.suffix])[2] for line in source.splitlines())
            found.append((path, "\n".join(lines)))
    return tuple(found)


def docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


def comments(source: str) -> Iterator[str]:
    """Yield the comments, those on lines that follow each other as one."""
    last, lines = -1, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] > last + 1 and lines:
                yield "\n".join(lines)
                lines = []
            lines.append(token.string)
            last = token.start[0]
    if lines:
        yield "\n".join(lines)


def test_texts_are_found():
    suffixes = {path.suffix for path, _ in texts()}
    assert {".py", ".md", ".cc", ".cu"} <= suffixes
    assert len(texts()) > 1000


def test_files_that_are_named_exist():
    """A path from the root, or a name alone, which may lie in any folder."""
    names = OTHERS | {path.name for path in files()}
    missing = []
    for path, text in texts():
        for found in PATH.findall(text):
            if not (any(ROOT.glob(found)) if "*" in found else (ROOT / found).exists()):
                missing.append(f"{shown(path)}: {found}")
        missing += [f"{shown(path)}: {found}" for found in NAME.findall(text) if found not in names]
    assert not missing, "\n".join(missing)


def test_pages_that_are_named_exist():
    names = {path.name for path in pages()}
    missing = [
        f"{shown(path)}: {found}"
        for path, text in texts()
        for found in PAGE.findall(text)
        if not (ROOT / found).is_file() and not (path.parent / found).is_file() and found not in names
    ]
    assert not missing, "\n".join(missing)


def test_sections_that_are_named_exist():
    """§N belongs to the page named before it, or else to the page that it stands in."""
    missing = []
    for path, text in texts():
        for found in SECTION.finditer(text):
            named = PAGE.findall(text[: found.start()])
            page = path if path.suffix == ".md" and path.name == "methods.md" else ROOT / (named or ["?"])[-1]
            if not page.is_file():
                page = path.parent / (named or ["?"])[-1]
            if not page.is_file() or not re.search(rf"^## {found[1]}\b", page.read_text(), re.MULTILINE):
                missing.append(f"{shown(path)}: {page.name} §{found[1]}")
    assert not missing, "\n".join(missing)


@cache
def identifiers() -> dict[str, set[str]]:
    """Return every name that a module of ours defines or uses, and a package's modules, by its own name."""
    folders = {path.name for path in (ROOT / "memedge").iterdir() if path.is_dir()}
    found: dict[str, set[str]] = {"memedge": {"engine", "export", "_core"} | folders}
    for path in files():
        if path.suffix == ".py":
            found.setdefault(path.parent.name, set()).add(path.stem)
            known = found.setdefault(path.stem, set())
            for node in ast.walk(ast.parse(path.read_text())):
                known |= {str(getattr(node, field, "")) for field in ("name", "id", "attr", "arg")}
    return found


def test_names_of_modules_exist():
    """`module.name` in code's own words: the module has it; in parentheses, such a module is there."""
    missing = []
    for path, text in texts():
        if path.suffix == ".md":
            continue
        for module, name in DOTTED.findall(text):
            # Or the word before the dot is a variable of the file itself.
            own = identifiers().get(path.stem, set())
            if module in identifiers() and name not in identifiers()[module] | own | SUFFIX:
                missing.append(f"{shown(path)}: {module}.{name}")
        for module, name in POINTER.findall(text):
            if module not in identifiers() and name not in SUFFIX and importlib.util.find_spec(module) is None:
                missing.append(f"{shown(path)}: {module}.{name}")
    assert not missing, "\n".join(missing)


def test_arguments_that_are_described_exist():
    """In "Args:" of every docstring; one line may describe several."""
    wrong = []
    for path in files():
        if path.suffix != ".py" or path.parts[len(ROOT.parts)] not in ("engine", "export", "memedge"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            described = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.kwarg)
            known = {one.arg for one in arguments if one}
            for names in re.findall(r"^ {4}(\w[\w, ]*):", described[1] if described else "", re.MULTILINE):
                wrong += [f"{shown(path)}, {node.name}: {name}" for name in names.split(", ") if name not in known]
    assert not wrong, "\n".join(wrong)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as repositories and mkdocs.yml make them."""
    prose = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading) for heading in headings)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\- ]", "", heading.strip()).lower()) for heading in plain}


def test_links_lead_somewhere():
    """Relative to the page, within the repository; and the heading is there."""
    broken = []
    for page in pages():
        for link in LINK.findall(FENCE.sub("", page.read_text())):
            target, _, anchor = link.partition("#")
            if target.startswith(("https://", "http://")):
                continue
            path = (page.parent / target).resolve() if target else page
            inside = path.is_relative_to(ROOT) and path.is_file()
            if not inside or (anchor and anchor not in anchors(path)):
                broken.append(f"{shown(page)}: {link}")
    assert not broken, "\n".join(broken)


def test_providers_are_named():
    from memedge import Detector
    from memedge.engine.providers import PROVIDERS

    table = (ROOT / "docs/providers.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE) == list(PROVIDERS), "in the order of auto"
    for name in PROVIDERS:
        assert f'"{name}"' in inspect.getdoc(Detector.load)


def test_detectors_and_commands_are_named():
    from memedge.cli import app
    from memedge.detectors import NAMES

    worth, commands = (ROOT / "docs/detectors.md").read_text(), (ROOT / "docs/commands.md").read_text()
    rows = " ".join(re.findall(r"^\| (`[^-].*?) \|", worth, re.MULTILINE))
    # "`alignment`; flat" stands for two.
    assert {name.removesuffix("-flat") for name in NAMES} == set(re.findall(r"`([\w-]+)`", rows))
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert re.search(rf"\b{name}\b", commands), name
        assert f"memedge {name}" in (ROOT / "README.md").read_text(), name


def test_environment_variables_are_named():
    used = {
        name
        for path in files()
        if path.suffix in (".py", ".sh") and path != Path(__file__)
        for name in re.findall(r"MEMEDGE_[A-Z_]+", path.read_text())
    }
    compiled = {"MEMEDGE_CUDA_TARGETS"}  # a macro, from setup.py to the core
    named = set(re.findall(r"MEMEDGE_[A-Z_]+", (ROOT / "CONTRIBUTING.md").read_text()))
    flags = {name for name in used if name.startswith("MEMEDGE_SERVE")}  # docs/serve.md has the flags they stand for
    assert named == used - compiled - flags


def test_public_names_are_on_the_site():
    """Each name of memedge, or the whole module that it comes from, is on a page of the reference."""
    import memedge

    rendered = set(re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in pages()), re.MULTILINE))
    for home in rendered:
        module, _, name = home.rpartition(".")
        assert importlib.util.find_spec(home.removesuffix(f".{name}")) or importlib.util.find_spec(module), home
    missing = []
    for name, (module, own) in memedge._HOMES.items():
        # A whole module shows its classes and functions, and no types that are written out.
        shown_by_module = inspect.isclass(one := getattr(memedge, name)) or inspect.isfunction(one)
        if f"{module}.{own}" not in rendered and not (shown_by_module and module in rendered):
            missing.append(f"{module}.{own}")
    assert not missing, f"put them on a page of docs/api: {missing}"


def examples() -> list[Path]:
    return [
        page
        for page in pages()
        if page.name != "README.md" and "python" in (m[1] for m in FENCE.findall(page.read_text()))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", examples(), ids=shown)
def test_examples_run(page, detector, tmp_path, monkeypatch):
    """A page's blocks, one after the other; they may use what a server has at hand."""
    monkeypatch.chdir(tmp_path)
    names = {"detector": detector, "eps_cond": np.ones((3, 4, 8, 8), np.float32)}
    names["eps_uncond"] = np.zeros((1, 4, 8, 8), np.float32)
    blocks = [code for _, language, code in FENCE.findall(page.read_text()) if language == "python"]
    (tmp_path / "bench").symlink_to(ROOT / "bench")  # for what runs in a clone
    for block in blocks:
        exec(block, names)
    if "stats" in names:
        np.testing.assert_allclose(names["stats"].norm, [16, 16, 16])
    if page.name == "remedies.md":
        assert names["result"].succeeded
        assert names["noise"].shape == (4, 16, 16)
    if "guarded" in names:
        assert [image is None for image in names["result"].images] == [True, False]
        check_loops(names)
    if "targets" in names:
        check_targets(names)
    if "done" in names:
        assert names["done"].calibration.memorized.prompts == 359


def check_targets(names):
    """docs/training.md: by the targets that it saves, memorized captions' own pictures are left out, the clean kept."""
    import torch
    from diffusers import DDPMScheduler

    pipe, known = names["pipe"], [one for one in names["captions"]() if one.strip and (one.clean or one.memorized)]
    pictures = [names["Image"].open(one.strip).convert("RGB").crop((0, 0, 64, 64)) for one in known]
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.image_processor.preprocess(pictures)).latent_dist.mean
    t = torch.full((len(known),), 500)
    noise = torch.randn(latents.shape, generator=torch.manual_seed(1))
    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, t)
    prompts = [one.prompt for one in known]
    states, empty = (pipe.encode_prompt(texts, "cpu", 1, False)[0].detach() for texts in (prompts, [""]))
    keep = names["MemorizationFilter"](pipe.unet, np.load("targets.npy")).mask(noisy, t, states, empty)
    assert not keep[[one.memorized for one in known]].any()
    assert keep[[one.clean for one in known]].float().mean() > 0.7


def check_loops(names):
    """docs/servers.md, "Anyone's loop": the sampler by hand is the pipeline's DDIM; both loops measure one norm."""
    import torch
    from diffusers import DDIMScheduler

    pipe = names["pipe"]
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    x = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    empty = pipe.encode_prompt("", "cpu", 1, False)[0].detach()
    demo = type("Watched", (names["Monitored"], Demo), {"threshold": 2.4, "unet": pipe.unet})()
    for prompt, stopped in (("the left luggage sign", True), ("a briefcase", False)):
        states = pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach()
        latents, monitor = names["sample"](pipe.unet, pipe.scheduler.alphas_cumprod, states, empty, x)
        if stopped:
            assert latents is None
            with pytest.raises(names["MemorizedError"]):
                demo.denoise_latent(x, torch.cat([empty, states]))
        else:
            kwargs = {"guidance_scale": 4.0, "num_inference_steps": 20, "output_type": "latent"}
            torch.testing.assert_close(latents, pipe(prompt, latents=x, **kwargs).images, rtol=1e-3, atol=1e-3)
            demo.denoise_latent(x, torch.cat([empty, states]))
        assert monitor.steps == (1 if stopped else 20)
        np.testing.assert_allclose(demo.monitor.norm, monitor.norm, rtol=1e-4)


class Demo:
    """A stand-in for the pipeline of TensorRT's demo: the loop's names and order of halves."""

    do_classifier_free_guidance = True

    def denoise_latent(self, latents, text_embeddings):
        import torch

        feed = {
            "sample": torch.cat([latents] * 2),
            "timestep": torch.tensor(999.0),
            "encoder_hidden_states": text_embeddings,
        }
        return self.runEngine("unet", feed)["latent"].chunk(2)

    def runEngine(self, model_name, feed_dict):  # noqa: ARG002, N802
        import torch

        with torch.no_grad():
            return {"latent": self.unet(*feed_dict.values()).sample}
