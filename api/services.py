"""What every route needs, built once by the application and closed with it."""

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from api.feed import JobFeed
from api.group_commit import GroupCommit
from api.inference_client import InferenceClient
from api.key_cache import KeyCache
from api.metering import Meter
from api.rates import RateLimits
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
    meter: Meter
    rates: RateLimits
    batch_wake: Wake
    callers: KeyCache[object]
    writer: GroupCommit

    @classmethod
    def from_settings(cls, settings: Settings) -> "Services":
        database = Database(settings.database)
        rates = RateLimits(settings.broker)
        return cls(
            settings=settings,
            database=database,
            store=open_store(settings.storage),
            bell=Bell(make_celery(settings.broker)),
            inference=InferenceClient(settings.inference.token.get_secret_value()),
            feed=JobFeed(database, settings.api.organization),
            meter=Meter(database, rates.spend),
            rates=rates,
            batch_wake=Wake(),
            callers=KeyCache(settings.api.key_seconds),
            writer=GroupCommit(database),
        )

    async def aclose(self) -> None:
        await self.feed.aclose()
        await self.inference.aclose()
        await run_in_threadpool(self.meter.close)
        await run_in_threadpool(self.writer.close)
        await run_in_threadpool(self.bell.close)
        self.database.close()
