"""What a user may get wrong, line by line, and the rule by which a type checker must say so."""

import torch

import memedge
from memedge.integrations.diffusers import guard
from memedge.training import MemorizationFilter

detector = memedge.Detector.load()
memedge.Detector.load(threds=2)  # reportCallIssue
verdict = detector.detect(["a prompt"], early="x")[0]  # reportArgumentType
print(verdict.score + 1.0)  # reportOptionalOperand
print(verdict.memorised)  # reportAttributeAccessIssue
verdict.norm = 0.0  # reportAttributeAccessIssue
print(detector.score(["a prompt"]).score.mean())  # reportOptionalMemberAccess
detector.score("a prompt", alignment="pixel")  # reportArgumentType
print(detector.info.calibration.threshold)  # reportOptionalMemberAccess
print(detector.explain(["a prompt"]))  # reportArgumentType
print(memedge.guidance_stats(1).norm)  # reportCallIssue
memedge.export_engine("model", "engine", precision="bf16")  # reportArgumentType
memedge.calibrate("engine", "memorized.txt")  # reportCallIssue
print(memedge.evaluate("engine", "a.txt", "b.txt", "report").findings.verdicts.found)  # reportOptionalMemberAccess
print(memedge.Mitigator.load().embedding("a prompt", loss="alignment").after)  # reportArgumentType
guard(None, detector, "stop")  # reportArgumentType
MemorizationFilter(torch.nn.Identity(), "2")  # reportArgumentType
print(memedge.Detecter)  # reportAttributeAccessIssue
