"""Hostile files and arrays by the thousand: what we read from outside, changed at random.

Each target takes a random generator, makes one input, and raises AssertionError where reading it ends in anything but a
result or a sentence of memedge's. By hand, as long as one likes:

    python tests/support/fuzzing.py manifest 1000000 [SEED]
"""

import copy
import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from producers import FakeCapsule, FakeInterface

from memedge import guidance_stats
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.directory import UNET, read_tensors
from memedge.engine.errors import MemedgeError
from memedge.engine.graphs import check_graph
from memedge.engine.manifest import parse_manifest
from memedge.engine.tokenizer_file import read_tokenizer
from memedge.prompts.columns import Columns
from memedge.prompts.corpus import Corpus
from memedge.prompts.inputs import find_files

PATH = Path("engine/manifest.json")
PLAIN_MANIFEST = json.loads((EMBEDDED_ENGINE / "manifest.json").read_text())
PLAIN_TOKENIZER = json.loads((EMBEDDED_ENGINE / "tokenizer.json").read_text())
PLAIN_TOKENIZER["model"] |= {"vocab": {"a": 0, "b</w>": 1, "ab</w>": 2}, "merges": [["a", "b</w>"]]}
PLAIN_GRAPH = (EMBEDDED_ENGINE / UNET).read_bytes()
SIZES = {path.name: path.stat().st_size for path in EMBEDDED_ENGINE.iterdir()}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63), 10**400, 1 << 16),
    *(
        "",
        "x",
        "\ud800",
        "\udc00\ud800",
        "\x1b]0;a\x07",
        "\u202e",
        "\0",
        "é" * 5000,
        "../x",
        "/",
        "fp32",
        "1",
        "unet.onnx",
    ),
    *([], [[]], {}, {"": 0}, {"\ud800": 1}, [1] * 300, float("nan"), float("inf")),
)
BYTES = (
    b"",
    b"\xff",
    b"\xed\xa0\x80",
    b"\0",
    b"[" * 3000,
    b"{" * 50,
    b'"',
    b",",
    b"1" * 5000,
    b"e999",
    b"\\ud800",
    b":",
)


def spots(tree: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Return every (container, key) within plain JSON."""
    found = [] if found is None else found
    keys: Any = range(len(tree)) if isinstance(tree, list) else list(tree) if isinstance(tree, dict) else ()
    for key in keys:
        found.append((tree, key))
        spots(tree[key], found)
    return found


def changed_json(random: Random, plain: Any) -> bytes:
    """Return JSON with some values replaced, removed, renamed, or moved elsewhere; sometimes with bytes changed too."""
    tree = copy.deepcopy(plain)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        container, key = random.choice(spots(tree))
        kind = random.random()
        if kind < 0.7:
            container[key] = copy.deepcopy(random.choice(VALUES))  # else later changes would change them
        elif kind < 0.8:
            del container[key]
        elif isinstance(container, dict) and kind < 0.9:
            container[str(random.choice(VALUES))[:99]] = container.pop(key)
        else:
            container[key] = copy.deepcopy(random.choice(spots(plain)))[0]
        if not tree:
            break
    content = json.dumps(tree, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    return changed_bytes(random, content) if random.random() < 0.2 else content


def changed_bytes(random: Random, content: bytes, most: int = 4) -> bytes:
    """Return bytes with some cut out, put in, or doubled."""
    data = bytearray(content)
    for _ in range(random.randint(1, most)):
        place = random.randrange(len(data) + 1)
        end = min(len(data), place + random.choice((0, 1, 2, 8, 100)))
        noise = random.randbytes(random.randint(0, 9))
        data[place:end] = random.choice((noise, random.choice(BYTES), data[place:end] * 2))
    return bytes(data)


def one_sentence(error: MemedgeError) -> None:
    """Assert that a message is one line, without control characters, and short."""
    message = str(error)
    assert message.isprintable() and len(message) < 500, repr(message)[:600]


def reading(read: Callable[[], object]) -> bool:
    """Read; return whether it was refused, which has to be in a sentence."""
    try:
        read()
    except MemedgeError as error:
        one_sentence(error)
        return True
    return False


def manifest(random: Random, _folder: Path) -> bool:
    content = changed_json(random, PLAIN_MANIFEST)
    return reading(lambda: parse_manifest(content, PATH))


def tokenizer(random: Random, folder: Path) -> bool:
    path = folder / "tokenizer.json"
    path.write_bytes(changed_json(random, PLAIN_TOKENIZER))
    return reading(lambda: read_tokenizer(path, 24))


def baseline(random: Random, folder: Path) -> bool:
    path = folder / "baseline.safetensors"
    header = {"uncond": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"engine": "x"}}
    text = changed_json(random, header)
    size = random.choice((len(text), len(text), len(text), random.getrandbits(64), random.randrange(1 << 20)))
    path.write_bytes(size.to_bytes(8, "little") + text + random.randbytes(random.choice((24, 24, 24, 0, 23, 25))))
    return reading(lambda: read_tensors(path, {"uncond": ((2, 3), np.float32)}))


def graph(random: Random, folder: Path) -> bool:
    path = folder / UNET
    path.write_bytes(changed_bytes(random, PLAIN_GRAPH, 8))
    return reading(lambda: check_graph(path, SIZES))


def prompts(random: Random, folder: Path) -> bool:
    """Prompt files of every kind with columns beside the prompts; half of those that are packed are damaged as such."""
    format = random.choice(("txt", "csv", "tsv", "jsonl"))
    texts = {
        "txt": b"a star\nb\n",
        "csv": b'id,prompt,memorized\n1,a star,1\n2,"b ""c""",0\n',
        "tsv": b'id\tTEXT\n1\ta star\n2\t"b\tc"\n',
        "jsonl": b'{"caption": "a star", "x": [1, {"y": null}], "n": 1.5}\n{"caption": "b", "x": 2}\n"c"\n',
    }
    packing = random.choice(("", "", ".gz"))
    text = texts[format]
    if not packing or random.random() < 0.5:
        text = changed_bytes(random, text)
    content = gzip.compress(text) if packing else text
    if packing and text == texts[format]:
        content = changed_bytes(random, content)
    place = folder / random.choice(("", "lang=en", "n=%F0%"))
    place.mkdir(exist_ok=True)
    path = place / f"prompts.{format}{packing}"
    path.write_bytes(content)
    columns = Columns(random.choice((None, None, "prompt", "x")), random.choice((None, None, (), ("id",), ("x", "n"))))

    def read() -> None:
        corpus = Corpus(find_files([str(path)]), columns)
        contents = corpus.inspect(lambda _: None)
        rows = list(corpus.rows())
        assert len(rows) == contents.rows
        assert all(row.kept.keys() <= contents.columns.keys() for row in rows)

    return reading(read)


def arrays(random: Random, _folder: Path) -> bool:
    types = ("f4", "f4", "f4", "f2", "f8", "i4", ">f4", "c8", "?", "O", "U1")
    cond = np.arange(2 * 4 * 6 * 6).astype(random.choice(types)).reshape(2, 4, 6, 6)
    views: list[Callable[[Any], Any]] = [
        lambda a: a[::-1],
        lambda a: a[..., ::2],
        lambda a: a.transpose(0, 1, 3, 2),
        lambda a: a[:0],
        lambda a: np.broadcast_to(a[:1], a.shape),
        lambda a: np.ma.masked_array(a),
        lambda a: a[0],
        lambda a: a.tolist(),
        lambda a: {"a": a},
        lambda _: None,
    ]
    given = random.choice(views)(cond) if random.random() < 0.8 else cond
    return reading(lambda: guidance_stats(given, cond if random.random() < 0.5 else given))


def producers(random: Random, _folder: Path) -> bool:
    fake: Any = FakeCapsule(random) if random.random() < 0.6 else FakeInterface(random, VALUES)
    return reading(lambda: guidance_stats(fake, np.ones((4, 6, 6), np.float32) if random.random() < 0.5 else fake))


TARGETS: dict[str, Callable[[Random, Path], bool]] = {
    target.__name__: target for target in (manifest, tokenizer, baseline, graph, prompts, arrays, producers)
}


def run(name: str, seeds: Iterator[int]) -> tuple[int, int]:
    """Run a target on each seed; return how many there were, and how many were refused."""
    count = refused = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            try:
                refused += TARGETS[name](Random(seed), Path(folder))
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}: {str(error)[:300]!r}") from error
            count += 1
    return count, refused


if __name__ == "__main__":
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    counts = run(sys.argv[1], iter(range(first, first + int(sys.argv[2]))))
    print("{} inputs, {} refused, each in a sentence".format(*counts))
