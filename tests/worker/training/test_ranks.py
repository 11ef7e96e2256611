"""What the processes of one job exchange, between two real ones."""

import multiprocessing
from pathlib import Path

import torch
from torch import nn

from tests.worker.training.tiny import make_examples
from worker.training.ranks import Ranks, device_of
from worker.training.task import Scores, Stop


def test_every_row_is_in_one_share_and_the_shares_are_about_equal() -> None:
    examples = make_examples(16)
    shares = [Ranks(rank, 3).share(examples) for rank in range(3)]
    lines = sorted(example.line for share in shares for example in share)
    assert lines == [example.line for example in examples]
    n_tokens = [sum(len(example.input_ids) for example in share) for share in shares]
    assert max(n_tokens) - min(n_tokens) <= max(len(example.input_ids) for example in examples)


def test_one_row_leaves_a_rank_without() -> None:
    examples = make_examples(1)
    assert Ranks(0, 2).share(examples) == examples
    assert Ranks(1, 2).share(examples) == []


def test_each_rank_has_the_gpu_of_its_number() -> None:
    assert [device_of("cuda:0", rank) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert device_of("cpu", 1) == "cpu"


def test_random_numbers_follow_from_step_and_rank() -> None:
    def draw(rank: int, step: int) -> float:
        Ranks(rank, 2).seed_step(7, step)
        return float(torch.rand(()))

    with torch.random.fork_rng():
        assert draw(0, 3) == draw(0, 3)
        assert len({draw(0, 3), draw(1, 3), draw(0, 4)}) == 3


def test_a_group_of_one_leaves_the_random_numbers_to_its_checkpoints() -> None:
    before = torch.get_rng_state()
    Ranks().seed_step(7, 3)
    assert torch.equal(torch.get_rng_state(), before)


def exchange(rank: int, meeting: Path) -> None:
    """One rank's part; an assertion that fails makes the exit code 1."""
    ranks = Ranks.join(meeting, rank, 2, "cpu")
    assert ranks.sum_scores(Scores(1.0 + rank, 2 + rank, 9)) == Scores(3.0, 5, 9)
    assert ranks.sum_scores(None if rank == 1 else Scores(1.0, 2, 9)) is None
    shared, missing = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    shared.grad = torch.full((2, 3), 1.0 + rank)
    if rank == 0:
        missing.grad = torch.ones(4)
    ranks.sum_gradients([shared, missing])
    assert shared.grad.eq(3).all()
    assert missing.grad is not None
    assert missing.grad.eq(1).all()
    start = nn.Parameter(torch.full((3,), float(rank)))
    ranks.copy_parameters([start])
    assert start.eq(0).all()
    assert ranks.copy_path(Path("state") if rank == 0 else None) == Path("state")
    asked = ranks.agree(lambda: Stop.DRAIN if rank == 0 else Stop.CANCEL)
    assert asked() is Stop.DRAIN
    ranks.leave()


def test_two_processes_sum_and_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=exchange, args=(rank, tmp_path / "meeting")) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
