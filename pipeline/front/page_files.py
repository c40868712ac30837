"""The page at `/`: plain files, that load nothing from elsewhere and run nothing that is not in them."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/page/timeline.js": ("timeline.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path → file and type. They hold nothing of anybody's, so that they need no key."""

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",  # pictures are fetched with the key
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text can become HTML, whatever a later change forgets
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """Return a route for each file."""
    routes = APIRouter(include_in_schema=False)
    for path, (name, media_type) in FILES.items():
        routes.add_api_route(path, _sender(name, media_type), methods=["GET"])
    return routes


def _sender(name: str, media_type: str):
    content = (FOLDER / name).read_bytes()

    async def send_file() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send_file
