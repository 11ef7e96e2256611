"""What holds of every engine: the same assertions on our own and on one that asks vLLM."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from tests.worker.inference.engine.test_engine import wait_for
from tests.worker.inference.tiny import (
    ADAPTER_BYTES,
    END,
    byte_engine,
    collect,
    decode_bytes,
    generate,
    submit,
    tiny_llama,
)
from tests.worker.inference.vllm.conftest import MakeAdapter
from tests.worker.inference.vllm.fake import references
from worker.inference.engine.engine import Engine, Request
from worker.inference.engine.errors import (
    AdapterFormatError,
    AdapterInUseError,
    AdapterPoolFullError,
    EngineClosedError,
    EngineFullError,
)
from worker.inference.engine.params import Sampling, TokenEvent, TokenLogprobs
from worker.inference.engine.scheduler import Limits

PROMPT = (72, 101, 108, 108, 111)
GREEDY = Sampling(max_tokens=16, temperature=0)


@pytest.fixture(params=["tunery", "vllm"])
def any_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "vllm":
        yield request.getfixturevalue("engine")
        return
    engine = byte_engine(
        limits=Limits(n_slots=2, max_running=4, max_waiting=4, adapter_bytes=2 * ADAPTER_BYTES)
    )
    yield engine
    engine.close()


def is_idle(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.running + stats.waiting + references(engine) == 0


def reference(max_tokens: int = 16) -> list[int]:
    output = tiny_llama().generate(
        torch.tensor([PROMPT]), max_new_tokens=max_tokens, do_sample=False, pad_token_id=END
    )
    return output[0, len(PROMPT) :].tolist()


def test_greedy_text_is_that_of_the_library(any_engine: Engine) -> None:
    tokens = reference()
    text, last = generate(any_engine, Request(PROMPT, GREEDY))
    assert text == decode_bytes([each for each in tokens if each != END]).rstrip("\ufffd")
    assert last.n_tokens == len(tokens)


def test_an_adapter_answers_as_itself_beside_the_base_and_another(
    any_engine: Engine, adapter: MakeAdapter
) -> None:
    ours = byte_engine()
    expected = []
    for seed in (1, 2):
        with ours.load(str(seed), adapter(seed)) as lease:
            expected.append(generate(ours, Request(PROMPT, GREEDY, lease=lease))[0])
    expected.append(generate(ours, Request(PROMPT, GREEDY))[0])
    ours.close()
    assert len(set(expected)) == 3
    with any_engine.load("1", adapter(1)) as one, any_engine.load("2", adapter(2)) as two:
        streams = [
            submit(any_engine, Request(PROMPT, GREEDY, lease=lease)) for lease in (one, two, None)
        ]
        assert [collect(stream)[0] for stream in streams] == expected
    wait_for(lambda: is_idle(any_engine))
    assert any_engine.audit() == {}


def test_an_adapter_in_use_is_not_evicted_and_an_idle_one_is(
    any_engine: Engine, adapter: MakeAdapter
) -> None:
    assert any_engine.acquire("1") is None
    with any_engine.load("1", adapter(1)):
        with any_engine.load("2", adapter(2)):
            with pytest.raises(AdapterPoolFullError):
                any_engine.load("3", adapter(3))
            with pytest.raises(AdapterInUseError):
                any_engine.unload("2")
        any_engine.load("3", adapter(3)).release()
        assert set(any_engine.stats().references) == {"1", "3"}
        assert any_engine.acquire("2") is None
    assert any_engine.unload("3") > 0
    assert any_engine.unload("3") == 0
    assert any_engine.audit() == {}


def test_an_adapter_whose_files_break_a_rule_is_refused(
    any_engine: Engine, adapter: MakeAdapter
) -> None:
    directory = adapter(1, target_modules=["q_proj"])
    with pytest.raises(AdapterFormatError, match="unknown_module"):
        any_engine.load("1", directory)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match="missing_file"):
        any_engine.load("1", directory)
    assert any_engine.stats().references == {}


def test_a_stop_string_is_never_part_of_the_text(any_engine: Engine) -> None:
    text, _ = generate(any_engine, Request(PROMPT, Sampling(24, temperature=0, ignore_eos=True)))
    stop = text[3:6]
    sampling = Sampling(24, temperature=0, ignore_eos=True, stop=(stop,), logprobs=1)
    events = submit(any_engine, Request(PROMPT, sampling))
    cut, last = collect(events)
    assert cut == text[: text.index(stop)]
    assert last.finish_reason == "stop"
    assert last.n_tokens < 24


def test_choices_draw_with_seeds_of_their_own_and_a_seed_repeats(any_engine: Engine) -> None:
    def texts(seed: int, n: int) -> list[str]:
        sampling = Sampling(8, seed=seed)
        events = submit(any_engine, Request(PROMPT, sampling, n=n))
        found, left = [""] * n, n
        while left:
            index, event = events.get(timeout=60)
            assert isinstance(event, TokenEvent)
            found[index] += event.text
            left -= event.finish_reason is not None
        return found

    three = texts(5, 3)
    assert len(set(three)) == 3
    assert texts(6, 1) == three[1:2]
    assert texts(5, 3) == three


def test_log_probabilities_are_the_models_own(any_engine: Engine) -> None:
    sampling = Sampling(4, temperature=0, logprobs=2, logit_bias={65: 100}, ignore_eos=True)
    request = Request(PROMPT, sampling, scores_prompt=True)
    events = submit(any_engine, request)
    scored: list[TokenLogprobs] = []
    prompt: list[TokenLogprobs] = []
    while True:
        _, event = events.get(timeout=60)
        assert isinstance(event, TokenEvent)
        scored += event.logprobs
        prompt += event.prompt_logprobs
        if event.finish_reason is not None:
            break
    assert [each.token for each in scored] == [65] * 4
    assert [each.offset for each in scored] == [0, 1, 2, 3]
    with torch.no_grad():
        logits = tiny_llama()(input_ids=torch.tensor([[*PROMPT, 65, 65, 65, 65]])).logits[0]
    rows = torch.log_softmax(logits.float(), -1)
    for row, each in zip(rows, [*prompt, *scored], strict=False):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)
        assert [token for token, _ in each.top] == row.topk(2).indices.tolist()
        assert all(first[1] >= second[1] for first, second in pairwise(each.top))


def test_no_tokens_wanted_means_the_prompt_is_scored_only(any_engine: Engine) -> None:
    scored = Request(PROMPT, Sampling(0, logprobs=0), scores_prompt=True)
    text, last = generate(any_engine, scored)
    assert (text, last.finish_reason, last.n_tokens) == ("", "length", 0)
    assert [each.token for each in last.prompt_logprobs] == list(PROMPT[1:])
    text, last = generate(any_engine, Request(PROMPT, Sampling(0)))
    assert (text, last.finish_reason, last.prompt_logprobs) == ("", "length", ())


def test_an_aborted_request_frees_its_adapter(any_engine: Engine, adapter: MakeAdapter) -> None:
    with any_engine.load("1", adapter(1)) as lease:
        request = Request(PROMPT, Sampling(4000, ignore_eos=True), n=2, lease=lease)
        ticket = any_engine.submit(request, lambda index, event: None)
        wait_for(lambda: any_engine.stats().n_drawn > 4)
        assert any_engine.stats().references == {"1": 3}
        ticket.abort()
        wait_for(lambda: any_engine.stats().running == 0)
        ticket.abort()
    assert is_idle(any_engine)
    assert any_engine.audit() == {}


def test_more_than_may_wait_is_refused_and_the_rest_goes_on(any_engine: Engine) -> None:
    long = Sampling(4000, ignore_eos=True)
    tickets = [any_engine.submit(Request(PROMPT, long, n=4), lambda *_: None) for _ in range(2)]
    with pytest.raises(EngineFullError):
        any_engine.submit(Request(PROMPT, GREEDY), lambda *_: None)
    for ticket in tickets:
        ticket.abort()
    wait_for(lambda: is_idle(any_engine))
    assert generate(any_engine, Request(PROMPT, GREEDY))[1].n_tokens > 0


def test_closing_ends_what_runs_with_an_error(any_engine: Engine, adapter: MakeAdapter) -> None:
    with any_engine.load("1", adapter(1)) as lease:
        running = submit(any_engine, Request(PROMPT, Sampling(4000, ignore_eos=True), lease=lease))
        wait_for(lambda: any_engine.stats().n_drawn > 0)
        any_engine.close()
        with pytest.raises(EngineClosedError):
            collect(running)
        with pytest.raises(EngineClosedError):
            any_engine.submit(Request(PROMPT, GREEDY), lambda *_: None)
    assert not any_engine.stats().alive
    assert references(any_engine) == 0
