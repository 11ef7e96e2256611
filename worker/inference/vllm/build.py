"""From settings to an engine over a vLLM that has answered a token."""

import asyncio
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import structlog

from models.errors import UnavailableError
from models.settings import InferenceSettings, child_environment
from worker.base_models import BaseModelInfo, pick_device
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.stream import Decode
from worker.inference.vllm.adapters import Links
from worker.inference.vllm.client import VllmClient, VllmError
from worker.inference.vllm.engine import MAX_RUNNING, Server, VllmEngine, VllmLimits
from worker.inference.vllm.process import VllmProcess
from worker.inference.vllm.wire import BASE, ZERO
from worker.launch import WITHHELD

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_POLL_SECONDS = 0.25

logger = structlog.get_logger(__name__)


def build_vllm_engine(
    settings: InferenceSettings,
    directory: Path,
    info: BaseModelInfo,
    shapes: Mapping[str, ModuleShape],
    decode: Decode,
    stop_ids: frozenset[int],
) -> VllmEngine:
    """Start vLLM on the base model in `directory`; blocks until it has answered a token.

    Args:
        settings: Which vLLM, and how it is started.
        directory: Of the base model.
        info: Its identity.
        shapes: Its modules (`read_base`).
        decode: Token ids to text.
        stop_ids: Tokens that end an answer.

    Raises:
        UnavailableError: there is no such command, it ends, is too old or takes too long.
    """
    key, port = secrets.token_urlsafe(32), _free_port()
    command = command_of(settings, directory, info, port)
    process = VllmProcess(command, environment_of(settings, key))
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(_answered(process, url, key, settings.vllm_start_seconds))
        links = Links(settings.adapter_cache_dir)
        base = BASE
        if on_cpu(settings):
            base = ZERO
            asyncio.run(_load_zero(url, key, links.add_zero(ZERO, shapes)))
        limits = VllmLimits(
            settings.max_adapters, settings.vllm_max_lora_rank, MAX_RUNNING, settings.max_waiting
        )
        server = Server(process, VllmClient(url, key), links, base)
        return VllmEngine(server, shapes, decode, stop_ids, limits)
    except BaseException:  # a signal too
        process.stop()
        raise


def command_of(
    settings: InferenceSettings, directory: Path, info: BaseModelInfo, port: int
) -> list[str]:
    """Return the command that serves the base model in `directory`, slots for adapters in it."""
    return [
        *(settings.vllm_command, "serve", str(directory), "--served-model-name", BASE),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", _DTYPES[settings.precision], "--max-model-len", str(info.max_length)),
        "--enable-lora",
        *("--max-loras", str(settings.max_adapters + on_cpu(settings))),
        *("--max-cpu-loras", str(2 * settings.max_adapters + on_cpu(settings))),
        *("--max-lora-rank", str(settings.vllm_max_lora_rank)),
        *("--max-num-seqs", str(MAX_RUNNING)),
        # Not what the model's files say about sampling: requests say everything.
        *("--generation-config", "vllm"),
        # The library, and so the language, of our own grammars.
        *("--structured-outputs-config", '{"backend": "guidance"}'),
        *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
        *settings.vllm_arguments,
    ]


def on_cpu(settings: InferenceSettings) -> bool:
    """Return whether the base has to be asked as an adapter that changes nothing.

    On a CPU vLLM 0.32 finds the adapter of each token by an index that is -1 for the base, and so,
    in a batch with adapters, takes the last slot's for it (vllm-project/vllm#48421, open).
    """
    return pick_device(settings.device) == "cpu"


def environment_of(settings: InferenceSettings, key: str) -> dict[str, str]:
    """Return vLLM's environment; the key is in it, and not among arguments that everybody sees."""
    environment = child_environment(
        {
            "VLLM_API_KEY": key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        without=(*WITHHELD, "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"),
    )
    if settings.device.startswith("cuda:"):
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        number = int(settings.device.removeprefix("cuda:"))
        devices = visible.split(",") if visible else []
        environment["CUDA_VISIBLE_DEVICES"] = devices[number] if devices else str(number)
    return environment


def read_base(directory: Path) -> tuple[Mapping[str, ModuleShape], int | list[int] | None]:
    """Return the modules of a causal base and its end tokens, without loading its weights.

    Raises:
        ValueError: its files name no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from worker.inference.engine.lora import BaseLayers

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    generation = model.generation_config
    if (directory / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(directory)
    return BaseLayers(model).shapes, generation.eos_token_id


def refuse_own_model(adapter: Path, served: str) -> NoReturn:
    """Refuse an adapter that needs a copy of the base: beside vLLM there is no room for one.

    Raises:
        ValueError: always; the message says what to do.
    """
    raise ValueError(
        f"it is served as a model of its own ({served}), and this server's vLLM serves LoRA in a "
        "batch only. Serve its base by a server with TUNERY_INFERENCE__ENGINE=tunery."
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _load_zero(url: str, key: str, directory: Path) -> None:
    client = VllmClient(url, key)
    try:
        await client.load(ZERO, directory)
        await client.probe(ZERO)
    except VllmError as error:
        raise UnavailableError(f"vLLM cannot be used: {error}", code="vllm_unusable") from error
    finally:
        await client.close()


async def _answered(process: VllmProcess, url: str, key: str, seconds: float) -> None:
    client = VllmClient(url, key)
    deadline = time.monotonic() + seconds
    try:
        while not await client.is_healthy():
            if not process.is_alive:
                raise UnavailableError(
                    f"vLLM has ended instead of serving. Its last words:\n{process.last_words()}",
                    code="vllm_ended",
                )
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"vLLM has not begun to serve within {seconds:g} s "
                    "(TUNERY_INFERENCE__VLLM_START_SECONDS). Its last words:\n"
                    f"{process.last_words()}",
                    code="vllm_too_slow",
                )
            await asyncio.sleep(_POLL_SECONDS)
        version = await client.version()
        await client.probe(BASE)
    except VllmError as error:
        raise UnavailableError(f"vLLM cannot be used: {error}", code="vllm_unusable") from error
    finally:
        await client.close()
    logger.info("vllm_ready", version=version, pid=process.pid)
