"""Bugs of other servers (their issue numbers) that concern sampling and output: not ours.

The record of adapters and caches is ``test_bug_record.py``.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.domain.generation import GenerateRequest, SamplingParams
from tests.worker.inference.conftest import Tokenizers
from tests.worker.inference.conftest import few_threads as few_threads
from tests.worker.inference.conftest import tokenizers as tokenizers
from tests.worker.inference.engine.test_engine import adapter, is_idle, wait_for
from tests.worker.inference.engine.test_sampler import Only
from tests.worker.inference.tiny import Events, byte_engine, collect, generate, submit
from worker.inference.engine.engine import BatchingEngine
from worker.inference.engine.errors import GenerationError
from worker.inference.engine.grammar import Vocabulary
from worker.inference.engine.params import Sampling, TokenEvent
from worker.inference.engine.sequence import Request
from worker.inference.output_format import grammar_of
from worker.tool_syntax import HERMES

PROMPT = (72, 101, 108, 108, 111)


@pytest.fixture(scope="module")
def engine() -> Iterator[BatchingEngine]:
    engine = byte_engine()
    yield engine
    engine.close()


def yes() -> Only:
    return Only(*b"yes", size=256)


def test_15_an_output_format_that_breaks_costs_its_own_request_only(
    engine: BatchingEngine,
) -> None:  # vllm #5105: an error inside the loop ended every request
    request = Request(PROMPT, Sampling(12, temperature=0))
    alone = generate(engine, request)
    nothing_allowed = Request(PROMPT, Sampling(12), constraint=lambda: Only(size=256))
    broken, good = submit(engine, nothing_allowed), submit(engine, request)
    with pytest.raises(GenerationError, match="allows no token"):
        collect(broken)
    assert collect(good) == alone
    assert engine.stats().alive


def test_17_an_abort_inside_an_output_format_gives_the_adapter_back(
    engine: BatchingEngine, tmp_path: Path
) -> None:  # sglang #34205: aborted requests held their adapters for ever
    events = Events()
    with engine.load("17", adapter(tmp_path, 17)) as lease:
        endless = Request(
            PROMPT,
            Sampling(4000, temperature=0, logprobs=2),
            lease=lease,
            constraint=lambda: Only(*b"x" * 4000, size=256),
        )
        ticket = engine.submit(endless, lambda *event: events.put(event))
    events.get(timeout=30)
    ticket.abort()
    wait_for(lambda: is_idle(engine))
    assert engine.stats().references == {"17": 0}
    assert engine.audit() == {}


def test_18_sixteen_choices_each_have_a_format_and_a_release_of_their_own(
    engine: BatchingEngine, tmp_path: Path
) -> None:  # sglang #36894: n = 16 released one reference too many
    with engine.load("18", adapter(tmp_path, 18)) as lease:
        events = submit(
            engine, Request(PROMPT, Sampling(9, seed=1), n=16, lease=lease, constraint=yes)
        )
    texts, left = [""] * 16, 16
    while left:
        index, event = events.get(timeout=60)
        assert isinstance(event, TokenEvent)
        texts[index] += event.text
        left -= event.finish_reason is not None
    assert texts == ["yes"] * 16
    wait_for(lambda: is_idle(engine))


def test_also_one_requests_sampling_never_reaches_another(
    engine: BatchingEngine,
) -> None:  # transformers' batching: `do_sample` and unsupported processors were engine-wide
    plain = Request(PROMPT, Sampling(12, temperature=0))
    alone = generate(engine, plain)
    others = [
        Sampling(12, temperature=2.0, seed=3),
        Sampling(12, temperature=0, logit_bias={65: 100.0}),
        Sampling(12, temperature=0, presence_penalty=2.0, repetition_penalty=3.0),
        Sampling(12, temperature=0, ignore_eos=True, logprobs=3),
    ]
    streams = [submit(engine, Request(PROMPT, sampling)) for sampling in others]
    streams.append(submit(engine, Request(PROMPT, Sampling(12), constraint=yes)))
    assert generate(engine, plain) == alone
    for stream in streams:
        collect(stream)


def test_also_a_seed_repeats_its_text_in_any_batch(
    engine: BatchingEngine,
) -> None:  # transformers' batching had no seed of a request
    seeded = Request(PROMPT, Sampling(12, temperature=1.2, top_p=0.9, seed=5))
    alone = generate(engine, seeded)
    company = [submit(engine, Request((*PROMPT, at), Sampling(20, seed=at))) for at in (1, 2, 3)]
    assert generate(engine, seeded) == alone
    for stream in company:
        collect(stream)


def test_also_a_stop_string_over_token_borders_never_shows(engine: BatchingEngine) -> None:
    events = submit(
        engine,
        Request(
            PROMPT,
            Sampling(40, temperature=0, stop=("STOP",), logprobs=0),
            constraint=lambda: Only(*b"one STOP two", size=256),
        ),
    )
    text, tokens, reason = "", b"", None
    while reason is None:
        _, event = events.get(timeout=60)
        assert isinstance(event, TokenEvent)
        text += event.text
        tokens += bytes(each.token for each in event.logprobs)
        reason = event.finish_reason
    assert (text, tokens, reason) == ("one ", b"one ", "stop")


def test_also_a_schema_with_endless_white_space_ends(tokenizers: Tokenizers) -> None:
    """A model that likes line breaks best must still write its object."""
    tokenizer, renderer = tokenizers
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    request = GenerateRequest(
        request_id="r",
        base_model="tiny",
        adapter=None,
        prompt="x",
        json_schema=schema | {"additionalProperties": False},
        sampling=SamplingParams(),
    )
    vocabulary = Vocabulary(tokenizer, renderer.stop_ids)
    grammar = grammar_of(request, lambda: HERMES, vocabulary)
    assert grammar is not None
    constraint, ids = grammar(), list[int]()
    [line_break] = tokenizer.encode("\n", add_special_tokens=False)
    while not constraint.is_over:
        allowed = constraint.allowed()
        token = line_break if allowed[line_break] else int(allowed.int().argmax())
        constraint.advance(token)
        ids.append(token)
        assert len(ids) < 500
    assert json.loads(str(tokenizer.decode(ids))) == {"a": 1}
