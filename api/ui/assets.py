"""Files of the page with a hash in their URL, so that browsers keep them for ever."""

import hashlib
from functools import cache
from pathlib import Path

from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

HASH_LENGTH = 12


class Assets:
    """URLs of files in `folder`: ``app.css`` becomes ``app.css?v=HASH``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hash = cache(self._read_hash)

    def url(self, path: str) -> str:
        return f"{path}?v={self._hash(path)}"

    def _read_hash(self, path: str) -> str:
        file = self._folder / path
        if not file.is_file():
            return "missing"
        return hashlib.sha256(file.read_bytes()).hexdigest()[:HASH_LENGTH]


class StaticAssets(StaticFiles):
    """Serves the files; what is asked for by its hash never changes."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        by_hash = scope["query_string"].startswith(b"v=") and isinstance(response, FileResponse)
        response.headers["cache-control"] = (
            "public, max-age=31536000, immutable" if by_hash else "no-cache"
        )
        return response
