"""The audit of a checkpoint: does any embedding make it print a training picture? Needs torch (extra `train`)."""

from memedge.engine.errors import not_installed

try:
    from memedge.audit.cost import estimate
    from memedge.audit.figures import Audit, AuditedImage, AuditSettings, Check, Cost, Group, Share
    from memedge.audit.run import audit
    from memedge.audit.similarity import SSCD, Outlines, Similarity
except ModuleNotFoundError as error:
    raise ImportError(not_installed("memedge.audit", error, "train")) from error

__all__ = [
    "SSCD",
    "Audit",
    "AuditSettings",
    "AuditedImage",
    "Check",
    "Cost",
    "Group",
    "Outlines",
    "Share",
    "Similarity",
    "audit",
    "estimate",
]
