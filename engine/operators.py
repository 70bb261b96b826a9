"""The operators that an engine's graphs may hold, and their versions: those that exports write, and their kinds.

Each of them ends after work that its inputs' sizes bound. Missing on purpose: control flow (If, Loop, Scan), recurrent
layers, sequences and optional values, text, random numbers, and operators of other domains, which a runtime may take
from a library.
"""

from typing import Final

from memedge.engine.manifest import MOST_TAPS

MICROSOFT: Final = "com.microsoft"
# A runtime may look for an operator in each version before the one that is named, so 2⁴⁰ would take for ever.
OPSETS: Final = {"": range(18, 31), MICROSOFT: range(1, 2)}

_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Reciprocal", "Pow", "Exp", "Log", "Max", "Min"}
_ACTIVATIONS = {"Clip", "Erf", "Gelu", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Softmax", "Tanh"}
_PRODUCTS = {"Conv", "Gemm", "MatMul"}
_NORMS = {"GroupNormalization", "InstanceNormalization", "LayerNormalization"}
_REDUCTIONS = {"ReduceMax", "ReduceMean", "ReduceSum"}
_SHAPES = {
    *("Cast", "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape", "Slice"),
    *("Split", "Squeeze", "Transpose", "Unsqueeze", "Where"),
}
_CHOICES = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"}
_TEXT = {"ArgMax", "ConstantOfShape", "CumSum", "Floor", "GatherElements", "GatherND", "Range", "Trilu"}  # places
_TIMESTEP = {"Cos", "Sin"}
_PIXELS = {"DepthToSpace", "Resize", "SpaceToDepth"}
_INT8 = {"DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QuantizeLinear"}
_FUSED = {f"{MICROSOFT}::MultiHeadAttention"}

_EVERYWHERE = _ARITHMETIC | _ACTIVATIONS | _PRODUCTS | _NORMS | _REDUCTIONS | _SHAPES
_UNET = _EVERYWHERE | _CHOICES | _TIMESTEP | _PIXELS
_WHOLE = frozenset(_UNET | _FUSED | _INT8 | {f"{MICROSOFT}::DynamicQuantizeMatMul"})
_GRADIENT = _UNET | {"ConvTranspose"}

# By the names of engine/directory.py.
OPERATORS: Final[dict[str, frozenset[str]]] = {
    "text_encoder.onnx": frozenset(_EVERYWHERE | _CHOICES | _TEXT),
    "prefix.onnx": frozenset(_UNET | _FUSED),
    "unet.onnx": _WHOLE,
    **dict.fromkeys((f"screen_{number}.onnx" for number in range(1, MOST_TAPS + 1)), _WHOLE),
    "gradient.onnx": frozenset(_GRADIENT),
    "noise_gradient.onnx": frozenset(_GRADIENT),
}
