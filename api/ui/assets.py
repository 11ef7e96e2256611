"""Files of the page under a version in their path, so that browsers keep them for ever.

The version is a hash over all of them. As it stands in the path and not in the query, the modules
that a script imports by a relative path are of the same version.
"""

import hashlib
from functools import cached_property
from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

HASH_LENGTH = 12


class Assets(StaticFiles):
    """Serves the files of `folder` under ``VERSION/…``.

    A file that is asked for by another version (a page that was loaded before an update) is the
    present one, and is not kept.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(directory=folder)
        self._folder = folder

    @cached_property
    def version(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(self._folder.rglob("*")):
            if file.is_file():
                digest.update(file.relative_to(self._folder).as_posix().encode())
                digest.update(file.read_bytes())
        return digest.hexdigest()[:HASH_LENGTH]

    def url(self, path: str) -> str:
        """Return the path below the mount point."""
        return f"{self.version}/{path}"

    async def get_response(self, path: str, scope: Scope) -> Response:
        version, _, rest = path.partition("/")
        response = await super().get_response(rest, scope)
        kept = version == self.version and response.status_code in (200, 304)
        response.headers["cache-control"] = (
            "public, max-age=31536000, immutable" if kept else "no-cache"
        )
        return response
