"""The list of benchmarks."""

from pathlib import Path

from bench.__main__ import listing


def test_lists_each_benchmark_with_what_it_measures(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text('"""A package."""\n')
    (tmp_path / "_shared.py").write_text('"""Helpers."""\n')
    (tmp_path / "swap.py").write_text('"""How long a swap takes.\n\nMore."""\nimport nowhere\n')
    (tmp_path / "load.py").write_text('"""Requests a second."""\n')
    first, second = listing(tmp_path).splitlines()
    assert first.split(maxsplit=3) == ["python", "-m", "bench.load", "Requests a second."]
    assert second.split(maxsplit=3) == ["python", "-m", "bench.swap", "How long a swap takes."]


def test_says_so_when_there_are_none(tmp_path: Path) -> None:
    assert listing(tmp_path) == "There are no benchmarks yet.\n"
