"""The rules of the tree that no linter checks."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import api
import models
import worker

ROOT = Path(__file__).parents[1]
PACKAGES = ["api", "worker", "models"]
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_TRACKED_BYTES = 500_000
TENSOR_LIBRARIES = ["torch", "transformers", "peft", "bitsandbytes", "accelerate"]
# Modules without a test file of their own: what they declare is tested where it is used.
TESTED_ELSEWHERE = {
    "models/tables": "the registry's tests and the migrations'",
    "models/domain": "every model that derives from it, the registry's and the API's tests",
    "models/explain.py": "tests/api/test_openai.py: the words of every refused field",
    "models/registry/uploads.py": "tests/api/openai/test_uploads.py",
    "models/registry/merges.py": "tests/api/adapters/test_routes.py; worker/training/test_merge.py",
    "models/registry/audit.py": "tests/api/keys/test_audit_logs.py",
    "models/registry/permissions.py": "tests/api/openai/test_permissions.py",
    "models/broker.py": "tests/flow/test_recovery.py: with Valkey, doubled, and without any",
    "worker/kernels/gemm.py": "its neighbour's tests: test_products.py",
    "worker/kernels/linear.py": "its neighbour's tests: test_matrix.py",
    "worker/kernels/order.py": "its neighbour's tests: test_matrix.py",
    "worker/kernels/tiles.py": "its neighbour's tests: test_matrix.py",
    "worker/kernels/gradients.py": "its neighbour's tests: test_training.py",
    "worker/kernels/heads.py": "its neighbour's tests: test_training.py",
    "worker/kernels/attention.py": "its neighbour's tests: test_operators.py",
    "worker/kernels/layers.py": "its neighbour's tests: test_operators.py",
    "worker/kernels/low_rank.py": "its neighbour's tests: test_operators.py",
    "worker/kernels/numbers.py": "its neighbour's tests: test_operators.py",
    "worker/kernels/pairs.py": "tests/worker/training/packed/test_ways.py and test_matrices.py",
    "worker/kernels/causal.py": "tests/worker/training/packed/test_attend.py: beside the formula",
    "worker/training/packed/products.py": "test_lora.py: through the groups that multiply",
    "worker/training/packed/loop_products.py": "test_ways.py: beside the formula",
    "worker/training/packed/torch_products.py": "test_ways.py: beside the formula",
    "api/batch_lines.py": "tests/api/test_batches.py: every code of a faulty line",
    "api/wake.py": "tests/api/test_batches.py",
    "models/registry/batches.py": "tests/api/test_batches.py; PostgreSQL: tests/contract",
    "api/openai/batches.py": "tests/api/test_batches.py",
    "models/registry/stored_completions.py": "tests/contract/test_background.py, on both",
    "api/openai/filters.py": "tests/api/openai/test_fine_tuning.py",
    "models/registry/sweeps.py": "tests/api/openai/test_sweeps.py; PostgreSQL: tests/contract",
    "api/openapi.py": "tests/contract/test_fuzz.py: every status that comes is named",
    "api/actions.py": "tests/api/test_openai.py",
    "api/app.py": "tests/api/test_openai.py",
    "api/deps.py": "tests/api/test_openai.py",
    "api/errors.py": "tests/api/test_openai.py",
    "api/middleware.py": "tests/api/test_openai.py",
    "api/services.py": "tests/api/test_openai.py",
    "api/bodies.py": "tests/api/openai: the body of every route",
    "api/audit.py": "tests/api/keys/test_audit_logs.py",
    "api/operation_bodies.py": "tests/api/operations/test_routes.py",
    "api/adapters/imports.py": "tests/api/adapters/test_archive.py",
    "api/model_card.py": "tests/api/adapters/test_routes.py",
    "api/ui/pages.py": "tests/web/test_pages.py, in a browser",
    "api/ui/frame.py": "tests/web, in a browser",
    "api/ui/job_pages.py": "tests/web, in a browser",
    "api/ui/data_pages.py": "tests/web, in a browser",
    "api/ui/serve.py": "tests/web/test_pages.py, in a browser",
    "api/openai/serving.py": "tests/api/openai/test_chat.py and test_completions.py",
    "api/inference_client.py": "tests/flow/test_openai_sdk.py",
    "api/cli": "tests/flow/test_up.py: the processes as a person runs them",
    "worker/transformer_blocks.py": "tests/worker/training/reversible/test_blocks.py",
    "worker/inference/engine/errors.py": "tests/worker/inference: each refusal by its class",
    "worker/inference/engine/bottlenecks.py": "tests/worker/inference/engine/test_wrapped.py",
    "worker/inference/engine/columns.py": "tests/worker/inference/engine/test_slots.py",
    "worker/inference/engine/streams.py": "tests/worker/inference/engine/test_wrapped.py",
    "worker/inference/engine/methods/base.py": "tests/worker/inference/engine/test_runner.py",
    "worker/inference/engine/methods/lora.py": "engine/test_runner.py and test_adapter_config.py",
    "worker/inference/engine/params.py": "tests/worker/inference/engine",
    "worker/inference/engine/transcript.py": "engine/test_sequence.py and test_engine.py",
    "worker/inference/vllm/client.py": "tests/worker/inference/vllm/test_engine.py: each fault",
    "worker/inference/vllm/wire.py": "tests/worker/inference/vllm: what is sent and read",
    "worker/inference/vllm/adapters.py": "tests/worker/inference/vllm/test_engine.py: each refusal",
    "worker/inference/vllm/tied.py": "tests/worker/inference/vllm/test_process.py",
    "worker/inference/encoder_service.py": "tests/examples/test_fill_mask.py, over HTTP",
    "worker/inference/engine/weights.py": "tests/worker/inference/engine/test_runner.py",
    "worker/inference/engine/sequence.py": "tests/worker/inference/engine/test_engine.py",
    "worker/inference/previewer.py": "tests/flow/test_openai_sdk.py, over HTTP",
    "api/methods/routes.py": "tests/api/methods/test_catalogue.py",
    "worker/training/methods": "tests/worker/training/test_methods.py: the contract of each",
    "worker/training/tuners": "tests/worker/training/test_methods.py: the contract of each",
    "worker/data/formats/plain_text.py": "tests/test_corpus.py",
    "worker/data/normalised.py": "tests/worker/data/test_lint.py and training/test_prepare.py",
    "worker/data/reader.py": "tests/test_corpus.py: every format under any name",
    "worker/data/shapes/base.py": "tests/worker/data/shapes/test_chat.py and tests/test_corpus.py",
    "worker/data/shapes/chat_dialects.py": "tests/test_corpus.py: a file for each dialect",
    "worker/data/shapes/chat_faults.py": "tests/worker/data/shapes/test_chat.py: each code",
    "worker/data/shapes/labelled.py": "tests/test_corpus.py: a file for each dialect and fault",
    "worker/data/shapes/preference.py": "tests/test_corpus.py: a file for each dialect and fault",
    "worker/data/shapes/texts.py": "tests/test_corpus.py: a file for each dialect and fault",
    "worker/data/preview_command.py": "tests/worker/data/test_preview.py",
    "worker/row_error.py": "tests/worker/test_chat.py",
    "worker/data/records.py": "tests/worker/data/test_lint.py: every finding",
    "worker/training/methods/base.py": "tests/worker/training/methods",
    "worker/training/objectives/base.py": "tests/worker/training/objectives",
    "worker/training/follow.py": "tests/worker/training/test_followers.py, as a process",
    "worker/training/task.py": "tests/worker/training/test_loop.py",
    "worker/app.py": "tests/flow/test_recovery.py, with real processes",
    "worker/dispatcher.py": "tests/flow/test_recovery.py, with real processes",
    "worker/launch.py": "tests/flow/test_recovery.py, with real processes",
    "worker/tasks.py": "tests/flow/test_recovery.py, with real processes",
}


def python_files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "node_modules" not in path.parts]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def has_logic(path: Path) -> bool:
    """Whether a module defines a function or a method that does more than declare."""
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))


@pytest.mark.parametrize("module", ["api.app", "worker.app"])
def test_the_api_and_the_celery_parent_never_load_tensor_libraries(module: str) -> None:
    for library in TENSOR_LIBRARIES:
        assert find_spec(library), f"{library} is not installed, so this test would prove nothing"
    code = f"import sys, {module}; print(*({set(TENSOR_LIBRARIES)} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("package", [api, models, worker])
def test_the_generic_package_names_are_ours(package: object) -> None:
    """A dependency that ships a package called `models` would shadow ours, or be shadowed."""
    file = getattr(package, "__file__", None)
    assert file is not None, f"{package} is a namespace package: its __init__.py is missing"
    assert Path(file).is_relative_to(ROOT)


@pytest.mark.parametrize("top", [*PACKAGES, "tests"])
def test_every_folder_with_code_is_a_package(top: str) -> None:
    """Without `__init__.py` tests of the same name collide, and mistakes in imports hide."""
    folders = {path.parent for path in python_files(top)}
    folders |= {parent for folder in folders for parent in folder.parents if ROOT in parent.parents}
    missing = [name_of(folder) for folder in folders if not (folder / "__init__.py").is_file()]
    assert sorted(missing) == []


def test_no_module_at_the_top_of_a_package_is_named_like_a_library() -> None:
    """Run as a script, `worker/celery.py` imports itself, and `models/types.py` breaks `enum`."""
    names = {path.stem for top in PACKAGES for path in (ROOT / top).glob("*.py")}
    libraries = sys.stdlib_module_names | {"celery", "fastapi", "redis", *TENSOR_LIBRARIES}
    assert sorted((names - {"__init__", "__main__"}) & libraries) == []


def test_nothing_large_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    sizes = {
        name: (ROOT / name).stat().st_size
        for name in listed.stdout.decode().split("\0")
        if (ROOT / name).is_file()
    }
    assert sizes
    assert {name: size for name, size in sizes.items() if size > MAX_TRACKED_BYTES} == {}


def test_modules_stay_short() -> None:
    lengths = {
        name_of(path): len(path.read_text().splitlines())
        for path in python_files(*PACKAGES, "tests", "bench", "migrations")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_functions_stay_short() -> None:
    long = {}
    for path in python_files(*PACKAGES, "tests", "bench"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long[f"{name_of(path)}:{node.name}"] = length
    assert long == {}


def places_of_tests(path: Path) -> list[Path]:
    """Where a module's tests may be: a file of its own, or one for a whole folder above it."""
    module = path.relative_to(ROOT)
    subjects = [module.with_suffix(""), *module.parents[:-2]]
    return [ROOT / "tests" / subject.parent / f"test_{subject.name}.py" for subject in subjects]


def test_every_module_with_logic_has_its_test() -> None:
    missing = []
    for path in python_files(*PACKAGES):
        name = name_of(path)
        exempt = any(name == entry or name.startswith(f"{entry}/") for entry in TESTED_ELSEWHERE)
        if path.name in {"__init__.py", "__main__.py"} or exempt or not has_logic(path):
            continue
        if not any(test.is_file() for test in places_of_tests(path)):
            missing.append(name)
    assert missing == []


def test_every_test_file_has_its_module() -> None:
    """A renamed module must take its tests along."""
    orphans = []
    for top in PACKAGES:
        for path in (ROOT / "tests" / top).rglob("test_*.py"):
            source = ROOT / path.relative_to(ROOT / "tests")
            module = source.with_name(source.name.removeprefix("test_"))
            if not module.is_file() and not module.with_suffix("").is_dir():
                orphans.append(name_of(path))
    assert sorted(orphans) == []


def test_exemptions_name_what_exists() -> None:
    assert [name for name in TESTED_ELSEWHERE if not (ROOT / name).exists()] == []
