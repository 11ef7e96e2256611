"""Alembic's entry point: the tables of ``models.tables`` on the database that the settings name."""

from alembic import context

from models.db import Database
from models.settings import DatabaseSettings, load_settings
from models.tables import Base


def _settings() -> DatabaseSettings:
    url = context.config.attributes.get("url") or context.get_x_argument(as_dictionary=True).get(
        "url"
    )
    return DatabaseSettings(url=url) if url else load_settings().database


def run() -> None:
    database = Database(_settings())
    try:
        with database.engine.connect() as connection:
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                compare_type=True,
                render_as_batch=connection.dialect.name == "sqlite",
            )
            with context.begin_transaction():
                context.run_migrations()
    finally:
        database.close()


run()
