"""What every route needs, built once by the application and closed with it."""

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from api.feed import JobFeed
from api.inference_client import InferenceClient
from api.wake import Wake
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
    feed: JobFeed
    batch_wake: Wake

    @classmethod
    def from_settings(cls, settings: Settings) -> "Services":
        database = Database(settings.database)
        return cls(
            settings=settings,
            database=database,
            store=open_store(settings.storage),
            bell=Bell(make_celery(settings.broker)),
            inference=InferenceClient(settings.inference.token.get_secret_value()),
            feed=JobFeed(database, settings.api.organization),
            batch_wake=Wake(),
        )

    async def aclose(self) -> None:
        await self.feed.aclose()
        await self.inference.aclose()
        await run_in_threadpool(self.bell.close)
        self.database.close()
