"""The page at `/`: one file, which asks this server alone."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi.responses import HTMLResponse, Response

FILE = Path(__file__).with_name("page.html")


def page() -> Response:
    """The page, and what a browser is to let it do: run its own script, show pictures of its user, ask this server."""
    html = FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _digest(html, "script"),
        "style-src": _digest(html, "style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{what} {where}" for what, where in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def _digest(html: str, tag: str) -> str:
    """The one element of this name, as a policy names what stands in the file itself."""
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
