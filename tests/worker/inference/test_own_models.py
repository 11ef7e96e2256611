"""Adapters with a model of their own: who answers, how many there are, what is refused."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from models.domain.generation import AdapterRef
from models.errors import CapacityError, ConflictError, UnprocessableError
from models.storage import LocalStore
from tests.worker.inference.test_own_model import write_adapter
from tests.worker.inference.tiny import (
    Files,
    collect,
    generate,
    publish,
    shapes_of,
    submit,
    tiny_llama,
)
from worker.base_models import BaseModelInfo
from worker.inference.adapter_store import AdapterStore
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.params import Sampling
from worker.inference.own_model import load_own_model
from worker.inference.own_models import Built, OwnModels

REQUEST = Request((5, 6, 7), Sampling(max_tokens=8, temperature=0))

PROMPTS = ((5, 6, 7), (9,), tuple(range(20, 60)))

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def engine_of(model: Any) -> BatchingEngine:
    """An engine whose texts tell every token apart."""
    return BatchingEngine(model, lambda ids: "".join(chr(256 + each) for each in ids), [])


class Place:
    """A store with adapters on a tiny base, and the models made of them."""

    def __init__(self, root: Path, base: BaseModelInfo) -> None:
        self.root, self.base = root, base
        self.store = LocalStore(root / "objects")
        tiny_llama().save_pretrained(root / "base")
        adapters = AdapterStore(self.store, root / "cache", base)
        self.models = OwnModels(adapters, "", self.build, 1)
        self.n_built = 0

    def build(self, adapter: Path, served: str) -> Built:
        self.n_built += 1
        self.asked = served
        own = load_own_model(self.root / "base", adapter, served, precision="fp32", device="cpu")
        return Built(engine_of(own.model), own.n_bytes, own.drift)

    def publish(self, peft: dict[str, Any], seed: int = 0, **changes: Any) -> AdapterRef:
        directory = write_adapter(
            self.root / "-".join(map(str, [*peft.values(), seed])), peft, seed
        )
        return publish(self.store, directory, self.base, method=peft["type"], **changes)


@pytest.fixture
def place(tmp_path: Path, base: BaseModelInfo) -> Any:
    place = Place(tmp_path, base)
    yield place
    place.models.close()


async def answer(place: Place, ref: AdapterRef) -> str:
    async with place.models.hold(ref) as engine:
        assert engine is not None
        return (await asyncio.to_thread(generate, engine, REQUEST))[0]


def test_what_a_batch_serves_needs_no_model(place: Place) -> None:
    files = Files(shapes_of(tiny_llama())).write(place.root / "lora")
    ref = publish(place.store, files, place.base)

    async def held() -> list[Any]:
        found = []
        for each in (None, ref):
            async with place.models.hold(each) as engine:
                found.append(engine)
        return found

    assert asyncio.run(held()) == [None, None]
    assert place.n_built == 0


def test_each_adapter_answers_for_itself_and_the_idle_one_makes_room(place: Place) -> None:
    gains = place.publish({"type": "ia3"}, served="merged")
    bottlenecks = place.publish({"type": "houlsby", "r": 4}, served="own")

    async def all_of_them() -> list[str]:
        both = [await answer(place, gains), await answer(place, bottlenecks)]
        return [*both, *await asyncio.gather(*(answer(place, gains) for _ in range(3)))]

    first, second, *again = asyncio.run(all_of_them())
    assert first != second
    assert again == [first] * 3
    assert place.asked == "merged"  # not rounded: nobody has asked for speed
    assert place.n_built == 3


def test_a_model_in_use_is_not_thrown_out(place: Place) -> None:
    one = place.publish({"type": "ia3"}, served="merged")
    other = place.publish({"type": "ia3"}, 1, served="merged")

    async def at_once() -> None:
        async with place.models.hold(one):
            with pytest.raises(CapacityError, match="TUNERY_INFERENCE__MAX_OWN_MODELS"):
                await answer(place, other)
        assert await answer(place, other)

    asyncio.run(at_once())


def test_what_does_not_fit_is_refused(place: Place) -> None:
    broken = write_adapter(place.root / "broken", {"type": "ia3"})
    (broken / "adapter_config.json").write_text('{"peft_type": "SOMETHING"}')
    ref = publish(place.store, broken, place.base, served="merged")
    with pytest.raises(UnprocessableError, match="not_loadable"):
        asyncio.run(answer(place, ref))
    other = place.publish({"type": "ia3"}, 2, served="merged", template_sha256="f" * 64)
    with pytest.raises(ConflictError, match="chat template"):
        asyncio.run(answer(place, other))


def batch_answers(place: Place, refs: Sequence[AdapterRef]) -> list[list[str]]:
    """What the mixed batch answers to the prompts, all at once."""
    engine = engine_of(tiny_llama())
    leases = [engine.load(ref.digest, place.root / "cache" / ref.digest) for ref in refs]
    streams = [[submit(engine, asked(prompt, lease)) for prompt in PROMPTS] for lease in leases]
    answers = [[collect(each)[0] for each in of_one] for of_one in streams]
    for lease in leases:
        lease.release()
    engine.close()
    return answers


def asked(prompt: tuple[int, ...], lease: Any = None) -> Request:
    return Request(prompt, Sampling(max_tokens=8, temperature=0), lease=lease)


async def merged_answers(place: Place, ref: AdapterRef) -> list[str]:
    async with place.models.hold(ref.model_copy(update={"merged": True})) as engine:
        assert engine is not None
        streams = [submit(engine, asked(prompt)) for prompt in PROMPTS]
        return [(await asyncio.to_thread(collect, each))[0] for each in streams]


def test_wanted_merged_it_answers_as_in_the_batch_each_time_it_is_loaded_and_can_be_turned_back(
    place: Place,
) -> None:
    """Greedy, in float32, three streams of each adapter at once; one model at a time."""
    refs = [
        place.publish({"type": "lora", "r": 4}),
        place.publish({"type": "lora", "r": 8, "use_dora": True}),
        place.publish({"type": "ia3"}),
        place.publish({"type": "adamix", "over": "lora", "r": 4}),
    ]

    async def turns() -> list[list[str]]:
        found = [await merged_answers(place, ref) for ref in [*refs, refs[0]]]
        async with place.models.hold(refs[0]) as engine:
            assert engine is None
        return found

    *merged, again = asyncio.run(turns())
    expected = batch_answers(place, refs)
    assert merged == expected
    assert again == expected[0]
    assert len({text for answers in expected for text in answers}) == len(refs) * len(PROMPTS)
    assert place.n_built == len(refs) + 1
    assert place.asked == "rounded"
    (kept,) = place.models.stats()
    assert (kept.digest, kept.served, kept.running) == (refs[0].digest, "merged", 0)
    assert kept.drift is not None
    assert 0 < kept.drift < 1e-5
    assert kept.n_bytes >= sum(each.nbytes for each in tiny_llama().parameters())


@pytest.mark.parametrize("kind", ["houlsby", "prompt"])
def test_what_cannot_be_merged_is_refused_when_it_is_wanted_so(place: Place, kind: str) -> None:
    ref = place.publish({"type": kind})
    with pytest.raises(UnprocessableError, match="cannot be merged"):
        asyncio.run(merged_answers(place, ref))
    assert place.models.stats() == []


def test_one_that_was_made_stays_for_those_who_waited_for_it(place: Place) -> None:
    one, other = (place.publish({"type": "ia3"}, seed, served="merged") for seed in (0, 1))

    async def at_once() -> str:
        assert await answer(place, other)  # from now on it is known how it is served
        first = asyncio.create_task(answer(place, one))
        while one.digest not in [each.digest for each in place.models.stats()]:
            await asyncio.sleep(0)
        with pytest.raises(CapacityError):
            await answer(place, other)
        return await first

    assert asyncio.run(at_once())
