"""Adapters chosen per request: every answer is that of the model that was named."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from tests.flow.conftest import Up, first_rows, wait_until

BASE = "smollm2-135m-instruct"
QUESTIONS = ["Who repairs a broken cleat?", "There is oil on the water by pier four."]
N_THREADS = 8
N_REQUESTS = 24


def answer(client: OpenAI, model: str, question: str) -> tuple[str, str | None]:
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=16,
    )
    return completion.choices[0].message.content or "", completion.system_fingerprint


@pytest.fixture(scope="module")
def two_adapters(up: Up, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two short trainings with different seeds and rates, run one after the other."""
    client = up.client()
    rows = first_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 8)
    with rows.open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune")
    jobs = [
        client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file.id,
            seed=seed,
            hyperparameters={"n_epochs": 2, "batch_size": 4},
            extra_body={"optimizer": {"learning_rate": rate}},
        )
        for seed, rate in ((1, 0.004), (2, 0.001))
    ]
    names = []
    for job in jobs:
        wait_until(
            lambda job=job: client.fine_tuning.jobs.retrieve(job.id).finished_at,  # type: ignore[misc]
            240,
            "the end of a job",
        )
        finished = client.fine_tuning.jobs.retrieve(job.id)
        assert finished.fine_tuned_model is not None, finished.error
        names.append(finished.fine_tuned_model)
    return names


def shared_length(one: str, other: str) -> int:
    differing = (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))


def test_base_and_two_adapters_answer_in_alternation_each_as_itself(
    up: Up, two_adapters: list[str]
) -> None:
    client = up.client()
    models = [BASE, *two_adapters]
    alone = {(m, q): answer(client, m, q) for m in models for q in QUESTIONS}
    assert len({alone[m, QUESTIONS[0]] for m in models}) == 3  # three models, three voices
    assert len({fingerprint for _, fingerprint in alone.values()}) == 3
    asked = [(models[index % 3], QUESTIONS[index % len(QUESTIONS)]) for index in range(N_REQUESTS)]
    with ThreadPoolExecutor(N_THREADS) as pool:
        together = list(pool.map(lambda pair: answer(client, *pair), asked))
    for (model, question), (text, fingerprint) in zip(asked, together, strict=True):
        own, own_fingerprint = alone[model, question]
        assert fingerprint == own_fingerprint
        # In bfloat16 the company in a batch may change a late token, but never whose answer it is.
        likeness = {each: shared_length(text, alone[each, question][0]) for each in models}
        assert likeness[model] == max(likeness.values()), (model, text, own)
