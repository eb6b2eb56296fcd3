"""What people see in a browser: `/` and `/chat`, files read once. Knows nothing of the API that the pages call."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
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
# nothing inline, nothing from elsewhere; the sanitizer alone may make HTML out of text
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
CHAT_LINK = "<!-- chat -->"


@dataclass(frozen=True)
class Page:
    """One file, ready to send."""

    content: bytes
    packed: bytes
    content_type: str
    policy: str
    etag: str

    async def respond(self, request: Request) -> Response:
        headers = {
            "content-security-policy": self.policy,
            "cross-origin-opener-policy": "same-origin",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",  # a new version is seen at once; an old one costs a 304
            "etag": self.etag,
            "vary": "accept-encoding",
        }
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self.etag.removeprefix("W/") in known:
            return Response(status_code=304, headers=headers)
        body = self.content
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
            body = self.packed
        return Response(body, headers=headers, media_type=self.content_type)


def page_routes(has_chat: bool) -> list[Route]:
    """The home page and, unless it is turned off, the chat page with its files."""
    home = (FOLDER / "home.html").read_text(encoding="utf-8")
    if not has_chat:
        before, _, after = home.partition(CHAT_LINK)
        home = before + after.partition(CHAT_LINK)[2]
    routes = [_route(HOME, _page(home.encode(), ".html", HOME_POLICY)), _file(f"{ASSETS}/home.css", "home.css")]
    if not has_chat:
        return routes
    routes.append(_file(CHAT, "chat.html"))
    for file in sorted(FOLDER.rglob("*")):
        if file.suffix in CONTENT_TYPES and file.suffix != ".html" and file.name != "home.css":
            name = file.relative_to(FOLDER).as_posix()
            routes.append(_file(f"{ASSETS}/{name}", name))
    return routes


def _file(path: str, name: str) -> Route:
    file = FOLDER / name
    return _route(path, _page(file.read_bytes(), file.suffix, CHAT_POLICY))


def _page(content: bytes, suffix: str, policy: str) -> Page:
    tag = hashlib.sha256(content).hexdigest()[:20]
    # weak: one tag for both encodings
    return Page(content, gzip.compress(content, 9, mtime=0), CONTENT_TYPES[suffix], policy, f'W/"{tag}"')


def _route(path: str, page: Page) -> Route:
    return Route(path, page.respond, methods=["GET"], include_in_schema=False)
