"""Which of TensorRT's names our code uses, and whether its bindings have them.

    python tests/support/trt_names.py BINDINGS FILE...

BINDINGS is a bindings wheel installed into a folder (python -m pip install --no-deps --target). The libraries that it
links are in other wheels, and TensorRT's cannot be had everywhere: empty ones stand in for them, enough to look names
up. Prints the names that are missing, one per line.
"""

import ast
import ctypes
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

MODULE = "trt"  # what our code calls the module, whichever it is
# What our code calls TensorRT's objects, and their classes: attributes of these names are looked up there.
VARIABLES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "kernels": "IRuntimeCache",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "tensor": "ITensor",
    "timing": "ITimingCache",
}
RTX_ONLY = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.DISABLED",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}


def used_names(files: Iterable[Path]) -> set[str]:
    """Return dotted names: of the module's, of its objects' attributes, and of methods that our subclasses override."""
    names: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [name for base in node.bases if (name := _dotted(base))]
                methods = [f.name for f in node.body if isinstance(f, ast.FunctionDef) and f.name[0] != "_"]
                names.update(f"{base}.{method}" for base in bases for method in methods)
            elif isinstance(node, ast.Attribute) and (name := _dotted(node)) and not name.endswith("__"):
                names.add(name)
    return names


def _dotted(node: ast.AST) -> str | None:
    """Return X.Y for trt.X.Y, and Class.y for variable.y and self._variable.y."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or not parts:
        return None
    if node.id == MODULE:
        return ".".join(reversed(parts))
    name = parts.pop().removeprefix("_") if node.id == "self" else node.id
    return f"{VARIABLES[name]}.{parts[-1]}" if parts and name in VARIABLES else None


def missing(module: ModuleType, names: Iterable[str]) -> set[str]:
    """Return those of the names that the module does not have."""
    absent = set()
    for name in names:
        place: object = module
        for part in name.split("."):
            place = getattr(place, part, None)
            if place is None:
                absent.add(name)
                break
    return absent


def load_alone(folder: Path) -> ModuleType:
    """Import the bindings in `folder`, with empty libraries in the place of TensorRT's own."""
    (binary,) = folder.glob("*/tensorrt*.so")
    content = binary.read_bytes()
    libraries = {name.decode() for name in re.findall(rb"lib(?:nv\w+|tensorrt\w+)\.so[.\d]*", content)}
    functions = re.findall(rb"\0(create\w+_INTERNAL|get\w*PluginRegistry|get\w+Version|initLib\w+)\0", content)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name.decode()}(void) {{ return 0; }}\n" for name in sorted(set(functions))))
    for library in sorted(libraries):
        path = folder / library
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", path, source], check=True)
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    return importlib.import_module(binary.parent.name)


if __name__ == "__main__":
    print(*sorted(missing(load_alone(Path(sys.argv[1])), used_names(map(Path, sys.argv[2:])))), sep="\n")
