"""What an inference server tells Prometheus; names and digests of adapters are never labels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.inference.engine.params import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(frozen=True, slots=True)
class OwnModelStats:
    """A model beside the base that answers for one adapter.

    Args:
        digest: The adapter.
        served: ``merged``, or ``own`` where its modules stand beside the weights.
        n_bytes: Of its parameters and buffers.
        drift: Relative difference of logits that the merge made; None where nothing was merged.
        running: Sequences that run on it.
        waiting: Sequences that wait for a turn.
    """

    digest: str
    served: str
    n_bytes: int
    drift: float | None
    running: int
    waiting: int


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.hits = Counter(
            "tunery_adapter_cache_hits",
            "Times that an adapter was found, by the tier where it was (host, disk).",
            ["tier"],
            registry=self.registry,
        )
        self.loads = Counter(
            "tunery_adapter_loads",
            "Adapters brought into host memory, by where they came from (disk, store) and result.",
            ["source", "result"],
            registry=self.registry,
        )
        self.load_seconds = Histogram(
            "tunery_adapter_load_seconds",
            "Time that the stages of a load took: fetch from the store, validate into host memory.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.disk_evictions = Counter(
            "tunery_adapter_disk_evictions",
            "Local copies of adapters removed to keep within the disk budget.",
            registry=self.registry,
        )
        self.rejects = Counter(
            "tunery_adapter_reject",
            "Requests for an adapter that were refused, by the error's code.",
            ["reason"],
            registry=self.registry,
        )
        self.own_loads = Counter(
            "tunery_own_model_loads",
            "Models made for one adapter beside the base, by way (merged, own) and result.",
            ["served", "result"],
            registry=self.registry,
        )
        self.own_evictions = Counter(
            "tunery_own_model_evictions",
            "Models beside the base that made room for others.",
            registry=self.registry,
        )

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Report what `stats` returns, asked anew at every scrape."""
        self.registry.register(_EngineCollector(stats))

    def watch_own(self, stats: Callable[[], Sequence[OwnModelStats]]) -> None:
        """Report the models beside the base that `stats` returns, asked at every scrape."""
        self.registry.register(_OwnModelCollector(stats))

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        resident = GaugeMetricFamily(
            "tunery_adapter_resident", "Adapters that a tier holds (host, slot).", labels=["tier"]
        )
        resident.add_metric(["host"], len(stats.references))
        resident.add_metric(["slot"], stats.slots)
        yield resident
        evictions = CounterMetricFamily(
            "tunery_adapter_evictions",
            "Adapters that made room for others in a tier (host, slot).",
            labels=["tier"],
        )
        evictions.add_metric(["host"], stats.host_evictions)
        evictions.add_metric(["slot"], stats.slot_evictions)
        yield evictions
        for name, text, value in (
            ("adapter_host_bytes", "Host memory that adapters take.", stats.adapter_bytes),
            ("adapter_references", "Leases on adapters.", sum(stats.references.values())),
            (
                "requests_waiting_for_adapter",
                "Sequences passed by others for want of a slot.",
                stats.waiting_for_slot,
            ),
            ("batch_distinct_adapters", "Adapters of running sequences.", stats.distinct_adapters),
            ("sequences_running", "Sequences that run.", stats.running),
            ("sequences_waiting", "Sequences that wait for a turn.", stats.waiting),
        ):
            yield GaugeMetricFamily(f"tunery_{name}", text, value)
        for name, text, value in (
            ("generated_tokens", "Tokens drawn.", stats.n_drawn),
            ("prompt_tokens", "Tokens of prompts of sequences that began.", stats.n_prompt),
            ("cached_prompt_tokens", "Of these, tokens that needed no computing.", stats.n_cached),
            ("preemptions", "Sequences that gave up their row.", stats.preemptions),
        ):
            yield CounterMetricFamily(f"tunery_{name}", text, value)


class _OwnModelCollector(Collector):
    def __init__(self, stats: Callable[[], Sequence[OwnModelStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        found = self._stats()
        models = GaugeMetricFamily(
            "tunery_own_models", "Models beside the base (merged, own).", labels=["served"]
        )
        n_bytes = GaugeMetricFamily(
            "tunery_own_model_bytes", "What their weights take.", labels=["served"]
        )
        for way in ("merged", "own"):
            of_it = [each for each in found if each.served == way]
            models.add_metric([way], len(of_it))
            n_bytes.add_metric([way], sum(each.n_bytes for each in of_it))
        drift = max((each.drift for each in found if each.drift is not None), default=0.0)
        yield from (
            models,
            n_bytes,
            GaugeMetricFamily(
                "tunery_own_model_drift_max",
                "Largest relative difference of logits that a merge held now has made.",
                drift,
            ),
            GaugeMetricFamily(
                "tunery_own_model_sequences_running",
                "Sequences that run on models beside the base.",
                sum(each.running for each in found),
            ),
        )
