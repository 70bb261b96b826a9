"""An audit in words, as the page, the sheet and the command say it."""

from memedge.audit.figures import AuditedImage, Group, Share
from memedge.wording import counted

STARTS = {"caption": "its caption", "perturbed": "its caption with noise", "random": "a random embedding"}


def outcome(image: AuditedImage) -> str:
    """Return what was found of a picture."""
    if image.by_prompt:
        return "printed by its caption"
    if image.start is not None and image.steps is not None:
        return f"printed by an embedding, {counted(image.steps, 'step')} from {STARTS[image.start]}"
    return "not printed"


def share(of: Share | None) -> str:
    """Return a share with its interval."""
    return "–" if of is None else f"{of.count} of {of.of}, {of.value:.2f} [{of.low:.2f}, {of.high:.2f}]"


def sentence(group: Group) -> str:
    """Return a group's summary."""
    prompt = "" if group.by_prompt is None else f"{group.by_prompt.count} by their captions, "
    kind = "" if group.name == "unlabelled" else f"{group.name} "
    pictures = counted(group.images, f"{kind}picture")
    return f"Of {pictures}, the model prints {prompt}{group.by_audit.count} by any embedding."
