"""What every route needs, built once by the application and closed with it."""

from dataclasses import dataclass

from api.inference_client import InferenceClient
from models.broker import Bell, make_celery
from models.db import Database
from models.settings import Settings
from models.storage import ObjectStore, open_store


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    database: Database
    store: ObjectStore
    bell: Bell
    inference: InferenceClient

    @classmethod
    def from_settings(cls, settings: Settings) -> "Services":
        return cls(
            settings=settings,
            database=Database(settings.database),
            store=open_store(settings.storage),
            bell=Bell(make_celery(settings.broker)),
            inference=InferenceClient(settings.inference.token.get_secret_value()),
        )

    async def aclose(self) -> None:
        await self.inference.aclose()
        self.database.close()
