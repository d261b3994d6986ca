"""The dashboard's files over HTTP: read once at the start, revalidated by their hash, with a strict policy."""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request, Response

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Texts of users are put in as text only; were one put in as HTML by mistake, the browser would refuse.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",  # kept, and asked for again by its ETag: an update is seen at once
}


class _File:
    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._type = TYPES[name.rpartition(".")[2]]
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'

    def response(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self._tag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._tag in known:
            return Response(status_code=304, headers=headers)
        return Response(self._content, media_type=self._type, headers=headers)


class Page:
    """The index at `/` for browsers, and `/dashboard/NAME`."""

    def __init__(self) -> None:
        folder = resources.files("labelstudio_backend") / "dashboard"
        names = [entry.name for entry in folder.iterdir() if entry.name.rpartition(".")[2] in TYPES]
        self._files = {name: _File(name, (folder / name).read_bytes()) for name in names}
        self.router = APIRouter()
        self.router.add_api_route("/dashboard/{name}", self._file, methods=["GET", "HEAD"], include_in_schema=False)

    @staticmethod
    def wanted(request: Request) -> bool:
        """Whether a browser asks for the page: it names text/html, which Label Studio and scripts do not."""
        return "text/html" in request.headers.get("accept", "")

    def index(self, request: Request) -> Response:
        """The page itself."""
        response = self._files["index.html"].response(request)
        response.headers["Vary"] = "Accept"
        return response

    async def _file(self, request: Request, name: str) -> Response:
        file = self._files.get(name)
        return Response("not found", 404, media_type="text/plain") if file is None else file.response(request)
