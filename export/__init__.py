"""Build time: a diffusers checkpoint becomes an engine directory. May import torch, diffusers, transformers, onnx."""
