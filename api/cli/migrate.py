"""Bring a database to the newest revision."""

from pathlib import Path

from alembic import command
from alembic.config import Config

import models
from models.errors import UnavailableError


def upgrade(url: str) -> None:
    """Run all migrations that the database at `url` has not seen.

    Raises:
        UnavailableError: the folder ``migrations`` is neither beside the code nor in the current
            directory (it is not part of the installed package).
    """
    candidates = [Path(models.__file__).parents[1] / "migrations", Path.cwd() / "migrations"]
    folder = next((path for path in candidates if (path / "env.py").is_file()), None)
    if folder is None:
        raise UnavailableError(
            "There is no folder 'migrations' here. Run this in a checkout of Tunery, or copy the "
            "folder beside it."
        )
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["url"] = url
    command.upgrade(config, "head")
