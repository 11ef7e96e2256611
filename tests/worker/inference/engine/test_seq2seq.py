"""Encoder-decoders: answers in turn are those of the library's own ``generate``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.worker.inference.tiny import collect, decode_bytes, submit
from tests.worker.training.encoders import SEQ2SEQ, save_encoder
from worker.inference.engine.engine import Request
from worker.inference.engine.errors import (
    AdapterFormatError,
    EngineClosedError,
    EngineError,
    EngineFullError,
    GenerationError,
)
from worker.inference.engine.params import Sampling, TokenEvent
from worker.inference.engine.seq2seq import Seq2SeqEngine

N_TOKENS = 6
SOURCES = [(7, 8, 9, 10, 11), (50,), (90, 3, 60)]


def tiny(family: str, directory: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(save_encoder(directory, family)).eval()


@pytest.mark.parametrize("forced", [None, 1], ids=["free", "forced"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_tokens_are_those_of_the_librarys_generate(
    family: str, forced: int | None, tmp_path: Path
) -> None:
    model = tiny(family, tmp_path)
    model.generation_config.forced_bos_token_id = forced
    begun = 1 if forced is None else 2
    expected = []
    for source in SOURCES:
        # One token more: where it ends, the library may force an end token (BART).
        output = model.generate(
            torch.tensor([source]),
            max_new_tokens=begun + N_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        expected.append(output[0, begun : begun + N_TOKENS].tolist())
    engine = Seq2SeqEngine(model, decode_ids, [])
    streams = [
        submit(engine, Request(source, Sampling(N_TOKENS, temperature=0))) for source in SOURCES
    ]
    answers = [[ord(c) - 256 for c in collect(stream)[0]] for stream in streams]
    engine.close()
    assert answers == expected


def decode_ids(ids: Any) -> str:
    return "".join(chr(256 + i) for i in ids)


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    engine = Seq2SeqEngine(tiny("t5", tmp_path), decode_bytes, [], max_running=1, max_waiting=1)
    yield engine
    engine.close()


def test_a_seed_draws_the_same_and_choices_differ(engine: Seq2SeqEngine) -> None:
    request = Request((5, 6), Sampling(N_TOKENS, temperature=2.0, seed=3), n=2)
    drawn = []
    for _ in range(2):
        events, texts, ended = submit(engine, request), ["", ""], 0
        while ended < 2:
            index, event = events.get(timeout=60)
            assert isinstance(event, TokenEvent)
            texts[index] += event.text
            ended += event.finish_reason is not None
        drawn.append(texts)
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_one_failure_stays_one_and_a_full_engine_says_so(engine: Seq2SeqEngine) -> None:
    broken = submit(engine, Request((5000,), Sampling(3)))  # no such token
    with pytest.raises(GenerationError):
        collect(broken)
    long = Sampling(10_000, temperature=0)
    events = submit(engine, Request((5,), long))
    ticket = engine.submit(Request((5,), long), lambda *_: None)
    with pytest.raises(EngineFullError):
        submit(engine, Request((5,), long))
    ticket.abort()
    assert isinstance(events.get(timeout=60)[1], TokenEvent)
    assert engine.stats().running == 1


def test_closing_ends_what_runs_with_an_error(engine: Seq2SeqEngine) -> None:
    seen: list[TokenEvent | EngineError] = []
    note: Callable[[int, TokenEvent | EngineError], None] = lambda _, event: seen.append(event)  # noqa: E731
    engine.submit(Request((5,), Sampling(10_000, temperature=0)), note)
    engine.close()
    assert isinstance(seen[-1], EngineClosedError)
    assert not engine.stats().alive
    with pytest.raises(EngineClosedError):
        submit(engine, Request((5,), Sampling(1)))


def test_an_adapter_is_never_put_into_it(engine: Seq2SeqEngine, tmp_path: Path) -> None:
    assert engine.acquire("0" * 40) is None
    with pytest.raises(AdapterFormatError, match="model of their own"):
        engine.load("0" * 40, tmp_path)
