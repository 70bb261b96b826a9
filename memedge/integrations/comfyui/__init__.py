"""memedge as nodes of ComfyUI: this folder, linked or copied into custom_nodes, is the package (docs/comfyui.md)."""

from typing import Any


async def comfy_entrypoint() -> Any:
    """Return the extension that ComfyUI asks a node package for; only this loads anything of ComfyUI's."""
    from memedge.integrations.comfyui.nodes import MemedgeExtension

    return MemedgeExtension()
