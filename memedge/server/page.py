"""The page at `/`: one file that needs nothing else, and no network but this server."""

from functools import cache

from starlette.requests import Request
from starlette.responses import Response

from memedge.embedded import DATA
from memedge.reports.document import source_hash

PARTS = DATA / "server"


async def page(_request: Request) -> Response:
    """`GET /`. Its policy lets no other script run, and nothing be loaded from elsewhere."""
    text, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(text, headers=headers, media_type="text/html; charset=utf-8")


@cache
def _page() -> tuple[str, str]:
    script, style = (PARTS / name for name in ("script.js", "style.css"))
    found = {name: path.read_text(encoding="utf-8") for name, path in (("script", script), ("style", style))}
    text = (PARTS / "page.html").read_text(encoding="utf-8")
    for name, content in found.items():
        text = text.replace(f"${{{name}}}", content)
    allowed = {name: source_hash(content) for name, content in found.items()}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy
