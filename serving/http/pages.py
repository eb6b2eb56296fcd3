"""Files of web/page -> routes for browsers: `/`, `/chat` and `/page/*`, with strict content security policies."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parents[2] / "web" / "page"
HOME, CHAT, ASSETS = "/", "/chat", "/page"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# nothing inline and nothing from other hosts; only the sanitizer may turn text into HTML
CHAT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
# Swagger writes style attributes
HOME_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CHAT_LINK = "<!-- chat -->"  # before and after the link in home.html


def page_routes(has_chat: bool) -> list[Route]:
    """The home page and, unless it is turned off, the chat page with its files. Reads all of them now."""
    home = (FOLDER / "home.html").read_text(encoding="utf-8")
    files = [FOLDER / "home.css"]
    routes: list[Route] = []
    if has_chat:
        files = [file for file in sorted(FOLDER.rglob("*")) if file.suffix in (".js", ".css", ".svg")]
        routes.append(_route(CHAT, (FOLDER / "chat.html").read_bytes(), ".html", CHAT_POLICY))
    else:
        before, _, after = home.partition(CHAT_LINK)
        home = before + after.partition(CHAT_LINK)[2]
    routes.append(_route(HOME, home.encode(), ".html", HOME_POLICY))
    for file in files:
        path = f"{ASSETS}/{file.relative_to(FOLDER).as_posix()}"
        routes.append(_route(path, file.read_bytes(), file.suffix, CHAT_POLICY))
    return routes


def _route(path: str, content: bytes, suffix: str, policy: str) -> Route:
    compressed = gzip.compress(content, 9, mtime=0)
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = {
        "content-security-policy": policy,
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",  # a new version is used at once; an unchanged one costs a 304
        "etag": f"W/{tag}",  # weak: the same for both encodings
        "vary": "accept-encoding",
    }

    async def respond(request: Request) -> Response:
        known_tags = {known.strip().removeprefix("W/") for known in request.headers.get("if-none-match", "").split(",")}
        if tag in known_tags:
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(content, headers=headers, media_type=CONTENT_TYPES[suffix])
        gzip_headers = {**headers, "content-encoding": "gzip"}
        return Response(compressed, headers=gzip_headers, media_type=CONTENT_TYPES[suffix])

    return Route(path, respond, methods=["GET"], include_in_schema=False)
