"""What comes out of a sequence beside its text: log-probabilities, scores, ends."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.worker.inference.engine.test_sampler import Only
from tests.worker.inference.tiny import (
    END,
    byte_engine,
    collect,
    decode_bytes,
    generate,
    submit,
    tiny_llama,
)
from worker.inference.engine.engine import BatchingEngine
from worker.inference.engine.params import Sampling, TokenEvent, TokenLogprobs
from worker.inference.engine.scheduler import Limits
from worker.inference.engine.sequence import Request

PROMPT = (72, 101, 108, 108, 111)
CHUNK = Limits().step_tokens


@pytest.fixture(scope="module")
def engine() -> Iterator[BatchingEngine]:
    engine = byte_engine()
    yield engine
    engine.close()


def run(engine: BatchingEngine, request: Request) -> tuple[str, list[TokenLogprobs], TokenEvent]:
    """Text, log-probabilities and last event of a single choice."""
    events, text = submit(engine, request), ""
    scored: list[TokenLogprobs] = []
    while True:
        _, event = events.get(timeout=60)
        assert isinstance(event, TokenEvent)
        text += event.text
        scored += event.logprobs
        if event.finish_reason is not None:
            return text, scored, event


def sampling(**options: Any) -> Sampling:
    return Sampling(**{"max_tokens": 24, "temperature": 0, **options})


def reference_logprobs(ids: list[int]) -> torch.Tensor:
    """Log-probabilities [len(ids), vocabulary] of what follows each id, by the model itself."""
    with torch.inference_mode():
        logits: torch.Tensor = tiny_llama()(input_ids=torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def test_each_token_of_the_text_has_the_models_log_probability(engine: BatchingEngine) -> None:
    text, scored, last = run(engine, Request(PROMPT, sampling(logprobs=3)))
    tokens = [each.token for each in scored]
    assert decode_bytes(tokens).rstrip("\ufffd") == text
    assert len(tokens) == last.n_tokens - (last.finish_reason == "stop")
    reference = reference_logprobs([*PROMPT, *tokens])
    for index, each in enumerate(scored):
        row = reference[len(PROMPT) - 1 + index]
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)
        assert [token for token, _ in each.top] == row.topk(3).indices.tolist()


def test_offsets_say_in_which_character_each_token_begins(engine: BatchingEngine) -> None:
    written = "aé日b🙂c"
    request = Request(
        PROMPT,
        sampling(max_tokens=99, logprobs=0),
        constraint=lambda: Only(*written.encode(), size=256),
    )
    text, scored, _ = run(engine, request)
    assert text == written
    offsets = [each.offset for each in scored]
    assert offsets == [i for i, char in enumerate(written) for _ in char.encode()]


def test_a_stop_string_leaves_no_log_probability_of_its_own_tokens(engine: BatchingEngine) -> None:
    whole, everything, _ = run(engine, Request(PROMPT, sampling(logprobs=0)))
    stop = whole[4:6]
    cut = whole.index(stop)
    text, scored, last = run(engine, Request(PROMPT, sampling(logprobs=0, stop=(stop,))))
    assert (text, last.finish_reason) == (whole[:cut], "stop")
    assert scored == [each for each in everything if each.offset < cut]


@pytest.mark.parametrize("length", [2, 5, CHUNK, CHUNK + 70])
def test_a_prompt_is_scored_token_by_token_across_chunks(
    engine: BatchingEngine, length: int
) -> None:
    prompt = [1 + index * 7 % 255 for index in range(length)]
    request = Request(tuple(prompt), sampling(max_tokens=0, logprobs=1), scores_prompt=True)
    _, event = submit(engine, request).get(timeout=60)
    assert isinstance(event, TokenEvent)
    assert (event.finish_reason, event.n_tokens, event.text) == ("length", 0, "")
    scored = event.prompt_logprobs
    assert [each.token for each in scored] == prompt[1:]
    reference = reference_logprobs(prompt)
    expected = [float(reference[index, token]) for index, token in enumerate(prompt[1:])]
    assert [each.logprob for each in scored] == pytest.approx(expected, abs=1e-3)


def test_scoring_the_prompt_changes_no_answer(engine: BatchingEngine) -> None:
    plain = generate(engine, Request(PROMPT, sampling()))
    request = Request(PROMPT, sampling(logprobs=0), scores_prompt=True)
    assert collect(submit(engine, request))[0] == plain[0]


def test_an_end_token_can_be_ignored_and_is_scored_but_still_no_text() -> None:
    model = tiny_llama()
    first = int(model(input_ids=torch.tensor([PROMPT])).logits[0, -1].argmax())
    engine = BatchingEngine(model, decode_bytes, [first, END])
    text, scored, last = run(
        engine, Request(PROMPT, sampling(max_tokens=9, ignore_eos=True, logprobs=0))
    )
    engine.close()
    assert (last.finish_reason, last.n_tokens) == ("length", 9)
    assert (scored[0].token, len(scored)) == (first, 9)
    assert chr(first) not in text


def test_a_constraint_holds_each_choice_and_ends_it(engine: BatchingEngine) -> None:
    request = Request(
        PROMPT,
        sampling(temperature=1.0, seed=1),
        n=2,
        constraint=lambda: Only(*b"yes", size=256),
    )
    events, texts = submit(engine, request), ["", ""]
    reasons: list[str] = []
    while len(reasons) < 2:
        index, event = events.get(timeout=60)
        assert isinstance(event, TokenEvent)
        texts[index] += event.text
        if event.finish_reason:
            reasons.append(event.finish_reason)
    assert (texts, reasons) == (["yes", "yes"], ["stop", "stop"])


def test_a_seed_gives_the_same_text_whatever_the_company(engine: BatchingEngine) -> None:
    request = Request(PROMPT, sampling(temperature=1.0, top_p=0.95, min_p=0.01, seed=11))
    alone = generate(engine, request)
    company = [
        submit(engine, Request((*PROMPT, other), sampling(temperature=1.3, seed=other)))
        for other in range(1, 6)
    ]
    assert generate(engine, request) == alone
    for stream in company:
        collect(stream)
