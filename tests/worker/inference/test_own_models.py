"""Adapters with a model of their own: who answers, how many there are, what is refused."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from models.domain.generation import AdapterRef
from models.errors import CapacityError, ConflictError, UnprocessableError
from models.storage import LocalStore
from tests.worker.inference.test_own_model import write_adapter
from tests.worker.inference.tiny import (
    Files,
    byte_engine,
    generate,
    publish,
    shapes_of,
    tiny_llama,
)
from worker.base_models import BaseModelInfo
from worker.inference.adapter_store import AdapterStore
from worker.inference.engine.engine import Request
from worker.inference.engine.params import Sampling
from worker.inference.own_model import load_own_model
from worker.inference.own_models import OwnModels

REQUEST = Request((5, 6, 7), Sampling(max_tokens=8, temperature=0))

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Place:
    """A store with adapters on a tiny base, and the models made of them."""

    def __init__(self, root: Path, base: BaseModelInfo) -> None:
        self.root, self.base = root, base
        self.store = LocalStore(root / "objects")
        tiny_llama().save_pretrained(root / "base")
        adapters = AdapterStore(self.store, root / "cache", base)
        self.models = OwnModels(adapters, "", self.build, 1)
        self.n_built = 0

    def build(self, adapter: Path, served: str) -> Any:
        self.n_built += 1
        model: Any = load_own_model(
            self.root / "base", adapter, served, precision="fp32", device="cpu"
        )
        return byte_engine(model)

    def publish(self, peft: dict[str, Any], seed: int = 0, **changes: Any) -> AdapterRef:
        directory = write_adapter(self.root / f"{peft['type']}-{seed}", peft, seed)
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
