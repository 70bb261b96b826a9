"""ONNX graphs: edited, split, rewritten, differentiated; no checkpoint is known here."""
