"""From settings to a running vLLM, and what is said where there is none."""

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.errors import UnavailableError
from models.settings import InferenceSettings
from models.storage import open_store
from tests.worker.inference.conftest import running
from tests.worker.inference.test_process import settings_in
from tests.worker.inference.tiny import Files, publish, shapes_of, tiny_llama
from worker.base_models import BaseModelInfo
from worker.inference.process import build_service
from worker.inference.vllm.adapters import check_adapter
from worker.inference.vllm.build import (
    build_vllm_engine,
    command_of,
    environment_of,
    read_base,
    refuse_own_model,
)
from worker.inference.vllm.engine import VllmEngine

SERVER = f"""#!{sys.executable} -S
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def reply(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply({{"version": "0.32.0"}})

    def do_POST(self):
        assert self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({{"choices": [{{"logprobs": {{"top_logprobs": [{{"token_id:1": 0.0}}]}}}}]}})

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""A command that answers a token and does nothing else."""


def settings(command: Path | str, root: Path, **changes: Any) -> InferenceSettings:
    return InferenceSettings(
        engine="vllm",
        precision="bf16",
        vllm_command=str(command),
        adapter_cache_dir=root / "adapters",
        **changes,
    )


def program(root: Path, text: str) -> Path:
    path = root / "vllm"
    path.write_text(text)
    path.chmod(0o755)
    return path


def start(chosen: InferenceSettings, base: BaseModelInfo) -> VllmEngine:
    shapes = shapes_of(tiny_llama())
    return build_vllm_engine(chosen, Path("/base"), base, shapes, str, frozenset())


def test_it_is_ready_when_it_has_answered_a_token_and_is_gone_when_closed(
    tmp_path: Path, base: BaseModelInfo
) -> None:
    engine = start(settings(program(tmp_path, SERVER), tmp_path), base)
    assert engine.stats().alive
    process = engine._process
    engine.close()
    engine.close()
    assert not process.is_alive
    assert not engine.stats().alive


@pytest.mark.parametrize(
    ("text", "seconds", "words"),
    [
        ("#!/bin/sh\necho no such flag; exit 2\n", 60, r"vLLM has ended.*no such flag"),
        ("#!/bin/sh\necho loading; exec sleep 60\n", 0.5, r"VLLM_START_SECONDS.*loading"),
        (SERVER.replace("0.32.0", "0.9.1"), 60, r"vLLM is 0\.9\.1; it must be at least 0\.32"),
    ],
)
def test_a_vllm_that_does_not_serve_is_an_error_with_its_last_words(
    text: str, seconds: float, words: str, tmp_path: Path, base: BaseModelInfo
) -> None:
    chosen = settings(program(tmp_path, text), tmp_path, vllm_start_seconds=seconds)
    with pytest.raises(UnavailableError, match=f"(?s){words}"):
        start(chosen, base)


def test_the_command_serves_the_base_alone_on_this_machine(
    tmp_path: Path, base: BaseModelInfo
) -> None:
    more = ["--max-model-len", "99"]
    chosen = settings("v", tmp_path, max_adapters=3, vllm_arguments=more, device="cuda:0")
    command = command_of(chosen, Path("/base"), base, 4711)
    assert command[:3] == ["v", "serve", "/base"]
    assert command[-2:] == ["--max-model-len", "99"]
    pairs = dict(pairwise(command))
    assert pairs["--host"] == "127.0.0.1"
    assert pairs["--dtype"] == "bfloat16"
    assert pairs["--max-loras"] == "3"
    assert pairs["--max-cpu-loras"] == "6"
    assert pairs["--max-lora-rank"] == "64"
    assert "--api-key" not in command
    on_cpu = command_of(chosen.model_copy(update={"device": "cpu"}), Path("/base"), base, 4711)
    assert on_cpu[on_cpu.index("--max-loras") + 1] == "4"  # one for the base itself


def test_on_a_cpu_the_base_is_asked_as_an_adapter_that_changes_nothing(
    tmp_path: Path, base: BaseModelInfo
) -> None:
    chosen = settings(program(tmp_path, SERVER), tmp_path, device="cpu")
    engine = start(chosen, base)
    [zero] = chosen.adapter_cache_dir.glob(".vllm-*/zero")
    assert engine._base == zero.name
    assert not check_adapter(zero, "0" * 40, shapes_of(tiny_llama()), 8)
    engine.close()


def test_the_environment_has_the_key_and_none_of_our_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNERY_INFERENCE__TOKEN", "ours")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    environment = environment_of(settings("v", tmp_path, device="cuda:1"), "key")
    assert environment["VLLM_API_KEY"] == "key"
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert "ours" not in environment.values()
    assert environment["PATH"] == os.environ["PATH"]


def test_a_base_is_read_without_its_weights(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shapes, ends = read_base(tmp_path)
    assert ends == 0
    assert shapes["lm_head"].is_output
    assert shapes["model.layers.1.mlp.down_proj"].in_features == 96


def test_an_adapter_with_a_model_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model of its own.*ENGINE=tunery"):
        refuse_own_model(Path("x"), "merged")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vllm_command": ""}, "vllm_command must be the path"),
        ({"precision": "nf4"}, "cannot hold a base in nf4"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, str], words: str) -> None:
    good = {"engine": "vllm", "precision": "bf16", "vllm_command": "vllm"}
    InferenceSettings.model_validate(good)
    with pytest.raises(ValidationError, match=words):
        InferenceSettings.model_validate(good | changes)


def test_a_server_of_the_settings_has_vllm_for_its_engine(
    tmp_path: Path, base_model_cache: Path, smollm2: tuple[Path, BaseModelInfo]
) -> None:
    chosen = settings_in(
        tmp_path,
        base_model_cache,
        engine="vllm",
        precision="bf16",
        vllm_command=str(program(tmp_path, SERVER)),
    )
    service, info = build_service(chosen)
    assert isinstance(service.engine, VllmEngine)
    shapes = service.engine._shapes
    files = Files(shapes).write(tmp_path / "adapter")
    merged = publish(open_store(chosen.storage), files, info, served="merged")
    with running(service) as client:
        state = client.get("/health").json()
        assert (state["status"], state["engine"]) == ("ok", "vllm")
        refused = client.post("/warm", json=merged.model_dump())
        assert refused.status_code == 422
        assert "TUNERY_INFERENCE__ENGINE=tunery" in refused.json()["error"]["message"]
        service.engine._process.stop()
        assert client.get("/health").status_code == 503
