"""An encoder answers each request with the adapter that it names, as the trainer's model does."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from models.domain.encoding import EncodeRequest
from models.domain.generation import AdapterRef
from models.domain.reports import AdapterManifest
from models.errors import InvalidRequestError, UnprocessableError
from tests.worker.training.encoders import headed_trainer, save_encoder
from worker.adapter_format import digest_of
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.inference.encoder_service import EncoderService
from worker.inference.encoders import EncoderEngine, classes
from worker.training import checkpoint
from worker.training.loop import Trainer

TEXT = "The gate is [MASK] shut."
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mask-a": ("mlm", {"mask_token_id": 103}),
    "mask-b": ("mlm", {"mask_token_id": 103}),
    "class": ("classification", {"labels": ["gate", "tide"]}),
    "many": ("classification", {"labels": ["gate", "tide", "lock"], "problem": "multi"}),
    "number": ("classification", {"labels": [], "problem": "regression"}),
    "tags": ("token_classification", {"labels": ["O", "THING", "STATE"]}),
    "vector": ("embedding", {}),
}


@dataclass
class Published:
    """An adapter on disk, and the trainer that it came from."""

    trainer: Trainer
    directory: Path
    manifest: AdapterManifest


@pytest.fixture(scope="module")
def chat(minilm: tuple[Path, BaseModelInfo]) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(minilm[0]))


@pytest.fixture(scope="module")
def base(chat: ChatRenderer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT that reads MiniLM's vocabulary."""
    directory = save_encoder(
        tmp_path_factory.mktemp("encoder"), "bert", vocab_size=len(chat.tokenizer)
    )
    chat.tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        kind: publish(folder / kind, base, *KINDS[kind], seed=seed)
        for seed, kind in enumerate(KINDS)
    }


def publish(folder: Path, base: Path, name: str, given: dict[str, Any], *, seed: int) -> Published:
    """Write an adapter whose weights have an effect that no other has."""
    trainer = headed_trainer(base, name, **given)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    trainer.task.model.eval()
    checkpoint.save(trainer, folder, "tiny")
    digest, files = digest_of(folder / "adapter")
    manifest = AdapterManifest(
        digest=digest,
        files=files,
        base_model="tiny",
        base_fingerprint="f" * 32,
        vocab_size=30522,
        template_sha256="t" * 64,
        method="lora",
        objective=name,
        objective_params=trainer.task.spec.objective,
        precision={"type": "fp32"},
        step=1,
        spec_sha256="s" * 64,
        data_sha256="d" * 64,
        versions={},
    )
    return Published(trainer, folder / "adapter", manifest)


@pytest.fixture
def engine(base: Path, chat: ChatRenderer) -> EncoderEngine:
    return EncoderEngine(base, "fp32", "cpu", chat, max_adapters=4)


def ask(
    engine: EncoderEngine, task: Any, inputs: Any, who: Published | None = None, **more: Any
) -> Any:
    request = EncodeRequest(
        request_id="r", base_model="tiny", adapter=None, task=task, inputs=inputs, **more
    )
    if who is None:
        return engine.run(request)
    return engine.run(request, who.directory, who.manifest)


def own_logits(who: Published, ids: list[int], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = who.trainer.task.model(input_ids=torch.tensor([ids]), **more).logits[
            0
        ]
    return found


def test_masks_are_filled_as_each_adapters_own_model_does(
    engine: EncoderEngine, adapters: dict[str, Published], chat: ChatRenderer
) -> None:
    ids = chat.tokenizer(TEXT)["input_ids"]
    place = ids.index(103)
    seen = []
    for kind in ("mask-a", "mask-b", "mask-a"):
        [result], n_tokens = ask(engine, "fill_mask", [TEXT], adapters[kind], top_k=3)
        best = own_logits(adapters[kind], ids)[place].softmax(-1).topk(3)
        [mask] = result["masks"]
        assert [each["token"] for each in mask] == best.indices.tolist()
        assert [each["probability"] for each in mask] == pytest.approx(best.values.tolist())
        assert result["text"].startswith("the gate is ")
        assert n_tokens == len(ids)
        seen.append(mask)
    assert seen[0] == seen[2] != seen[1]


def test_start_and_end_tokens_written_out_are_not_put_around_twice(
    engine: EncoderEngine, adapters: dict[str, Published]
) -> None:
    bare = ask(engine, "fill_mask", [TEXT], adapters["mask-a"])
    assert ask(engine, "fill_mask", [f"[CLS] {TEXT} [SEP]"], adapters["mask-a"]) == bare


def test_classifiers_answer_with_their_labels(
    engine: EncoderEngine, adapters: dict[str, Published], chat: ChatRenderer
) -> None:
    texts = ["The tide is high.", "The gate is shut."]
    results, _ = ask(engine, "classify", texts, adapters["class"])
    for text, result in zip(texts, results, strict=True):
        shares = own_logits(adapters["class"], chat.tokenizer(text)["input_ids"]).softmax(-1)
        assert result["scores"] == pytest.approx(
            dict(zip(["gate", "tide"], shares.tolist(), strict=True))
        )
        assert result["label"] == ["gate", "tide"][int(shares.argmax())]
    [many], _ = ask(engine, "classify", texts[:1], adapters["many"])
    assert set(many["scores"]) == {"gate", "tide", "lock"}
    [number], _ = ask(engine, "classify", texts[:1], adapters["number"])
    logits = own_logits(adapters["number"], chat.tokenizer(texts[0])["input_ids"])
    assert number["value"] == pytest.approx(float(logits[0]), rel=1e-4)


def test_a_second_text_is_a_segment_of_its_own(
    engine: EncoderEngine, adapters: dict[str, Published], chat: ChatRenderer
) -> None:
    [result], _ = ask(engine, "classify", ["It rains."], adapters["class"], pairs=["It is wet."])
    both = chat.tokenizer("It rains.", "It is wet.")
    more = {"token_type_ids": torch.tensor([both["token_type_ids"]])}
    shares = own_logits(adapters["class"], both["input_ids"], **more).softmax(-1)
    assert list(result["scores"].values()) == pytest.approx(shares.tolist())


def test_words_get_the_label_of_their_first_token(
    engine: EncoderEngine, adapters: dict[str, Published], chat: ChatRenderer
) -> None:
    [result], _ = ask(engine, "classify", ["Lockkeepers wait"], adapters["tags"])
    ids = chat.tokenizer("Lockkeepers wait")["input_ids"]
    labels = own_logits(adapters["tags"], ids).argmax(-1)
    assert [each["word"] for each in result["words"]] == ["Lockkeepers", "wait"]
    names = ["O", "THING", "STATE"]
    assert [each["label"] for each in result["words"]] == [
        names[int(labels[1])],
        names[int(labels[-2])],
    ]


def test_vectors_have_length_1_and_are_the_adapters(
    engine: EncoderEngine, adapters: dict[str, Published], chat: ChatRenderer
) -> None:
    ids = chat.tokenizer("The tide")["input_ids"]
    (base, same), n_tokens = ask(engine, "embed", ["The tide", ids[1:-1]])
    [tuned], _ = ask(engine, "embed", ["The tide"], adapters["vector"])
    assert base == same
    assert n_tokens == 2 * len(ids)
    for result in (base, tuned):
        assert sum(each * each for each in result["embedding"]) == pytest.approx(1)
    with torch.no_grad():
        hidden = adapters["vector"].trainer.task.model(input_ids=torch.tensor([ids]))
    mean = hidden.last_hidden_state[0].mean(0)
    assert tuned["embedding"] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    assert base["embedding"] != pytest.approx(tuned["embedding"], abs=1e-3)


def test_an_adapter_that_had_to_go_comes_back_as_it_was(
    base: Path, chat: ChatRenderer, adapters: dict[str, Published]
) -> None:
    engine = EncoderEngine(base, "fp32", "cpu", chat, max_adapters=1)
    first = ask(engine, "fill_mask", [TEXT], adapters["mask-a"])
    ask(engine, "fill_mask", [TEXT], adapters["mask-b"])
    assert ask(engine, "fill_mask", [TEXT], adapters["mask-a"]) == first


def test_adapters_of_different_methods_stand_side_by_side(
    base: Path, chat: ChatRenderer, tmp_path: Path
) -> None:
    """PEFT refuses a second kind of adapter on a model; the base's weights are there once."""
    methods: list[dict[str, Any]] = [
        {"type": "lora", "r": 4, "dropout": 0.0},
        {"type": "houlsby", "r": 4},
        {"type": "vera", "r": 8},
        {"type": "meft", "r": 4},
    ]
    given = KINDS["mask-a"][1]
    published = [
        publish(tmp_path / str(seed), base, "mlm", {"peft": peft, **given}, seed=seed)
        for seed, peft in enumerate(methods)
    ]
    engine = EncoderEngine(base, "fp32", "cpu", chat, max_adapters=3)
    first = [ask(engine, "fill_mask", [TEXT], who) for who in published]
    assert all(one != other for one in first for other in first if one is not other)
    for who, answer in zip(published, first, strict=True):  # the oldest had to go and comes back
        assert ask(engine, "fill_mask", [TEXT], who) == answer


@pytest.mark.parametrize(
    ("task", "inputs", "kind", "words"),
    [
        ("fill_mask", [TEXT], None, "have no head"),
        ("classify", ["x"], None, "has no classes"),
        ("classify", ["x"], "mask-a", "objective 'mlm'"),
        ("embed", ["x"], "class", "does not answer embed"),
        ("fill_mask", ["No gap"], "mask-a", r"has no mask. Write \[MASK\]"),
        ("classify", ["word " * 600], "class", "this model takes 128"),
        ("embed", [[40000]], "vector", "this model's last is 30521"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    engine: EncoderEngine,
    adapters: dict[str, Published],
    task: Any,
    inputs: Any,
    kind: str | None,
    words: str,
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        ask(engine, task, inputs, adapters[kind] if kind else None)


def test_an_adapter_wanted_merged_is_not_answered_in_another_way(
    engine: EncoderEngine, minilm: tuple[Path, BaseModelInfo]
) -> None:
    nowhere: Any = None  # it is not opened
    info = minilm[1]
    ref = AdapterRef(
        name="ft:x", digest="d", base_model=info.name, base_fingerprint="f", merged=True
    )
    request = EncodeRequest(
        request_id="r", base_model=info.name, adapter=ref, task="embed", inputs=["x"]
    )
    with pytest.raises(UnprocessableError, match="merged"):
        asyncio.run(EncoderService(engine, nowhere, info, {}).encode(request))


def test_an_adapter_of_other_tensors_is_refused(
    engine: EncoderEngine, adapters: dict[str, Published], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    who = adapters["class"]
    tensors = load_file(who.directory / "adapter_model.safetensors")
    tensors["base_model.model.bert.extra.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        (who.directory / "adapter_config.json").read_text()
    )
    with pytest.raises(UnprocessableError, match="other_tensors"):
        ask(engine, "classify", ["x"], Published(who.trainer, tmp_path, who.manifest))


def test_several_labels_are_those_above_one_half() -> None:
    logits = torch.tensor([2.0, -1.0, 0.1])
    found = classes(logits, {"problem": "multi", "labels": ["a", "b", "c"]})
    assert found["labels"] == ["a", "c"]
