"""OpenAI's wire types for what clients send; nothing outside ``api.openai`` imports them."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    field_validator,
    model_validator,
)

from models.domain.base import JsonObject, Parameters, Text, require_known
from models.domain.generation import MAX_CHOICES
from models.domain.rows import ChatMessage
from models.domain.training import (
    Auto,
    EarlyStopping,
    Hyperparameters,
    Optimizer,
    Precision,
)

Strict = Annotated[float, Field(strict=True)]

MAX_PROMPTS = 128

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")


class DpoHyperparameters(Hyperparameters):
    """OpenAI's numbers of preference optimisation; ``"auto"`` is the objective's default."""

    beta: Auto | Annotated[Strict, Field(gt=0, le=2)] = "auto"


class MethodBody(Parameters):
    """OpenAI's ``method``: ``supervised`` is objective `sft` (or another of ours), or ``dpo``."""

    class Supervised(Parameters):
        hyperparameters: Hyperparameters | None = None

    class Dpo(Parameters):
        hyperparameters: DpoHyperparameters | None = None

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @property
    def hyperparameters(self) -> Hyperparameters | None:
        """The numbers of the method that `type` names."""
        chosen = self.dpo if self.type == "dpo" else self.supervised
        return chosen.hyperparameters if chosen else None

    @property
    def beta(self) -> float | None:
        """DPO's β, if one was given."""
        numbers = self.dpo.hyperparameters if self.dpo else None
        return None if numbers is None or numbers.beta == "auto" else numbers.beta

    @model_validator(mode="after")
    def _only_the_chosen_one(self) -> "MethodBody":
        other = "supervised" if self.type == "dpo" else "dpo"
        if getattr(self, other) is not None:
            raise ValueError(f"'{other}' is given, but 'type' is '{self.type}'; send only one")
        return self


def _three(given: Hyperparameters) -> Hyperparameters:
    """Return the three numbers that every method has."""
    return Hyperparameters(**{name: getattr(given, name) for name in Hyperparameters.model_fields})


def _check_metadata(pairs: dict[str, str]) -> dict[str, str]:
    if len(pairs) > 16:
        raise ValueError(f"has {len(pairs)} pairs; at most 16 are allowed")
    for key, value in pairs.items():
        if len(key) > 64 or len(value) > 512:
            raise ValueError("has a key longer than 64 or a value longer than 512 characters")
    return pairs


Metadata = Annotated[dict[Text, Text], AfterValidator(_check_metadata)]


class JobCreate(Parameters):
    """The body of ``POST /fine_tuning/jobs``: OpenAI's fields, then Tunery's (all optional).

    Tunery's fields come through the SDK's ``extra_body``. A plain OpenAI body trains QLoRA.
    """

    model: Text
    training_file: Text
    validation_file: Text | None = None
    suffix: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    method: MethodBody | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: Annotated[list[JsonObject], Field(max_length=0)] | None = None

    objective: JsonObject | None = None
    peft: JsonObject | None = None
    precision: Precision | None = None
    optimizer: Optimizer | None = None
    max_seq_length: Annotated[StrictInt, Field(ge=16, le=131072)] | None = None
    validation_split: Annotated[Strict, Field(ge=0, le=0.5)] | None = None
    on_error: Literal["fail", "skip"] | None = None
    on_overlong: Literal["error", "drop", "truncate"] | None = None
    early_stopping: EarlyStopping | None = None
    checkpoint_steps: Auto | Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    priority: Annotated[StrictInt, Field(ge=-100, le=100)] | None = None
    num_devices: Annotated[StrictInt, Field(ge=1, le=64)] | None = None
    packing: StrictBool | None = None

    @field_validator("suffix", mode="before")
    @classmethod
    def _empty_suffix_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _one_set_of_hyperparameters(self) -> "JobCreate":
        nested = self.method and self.method.hyperparameters
        if nested and self.hyperparameters and _three(nested) != self.hyperparameters:
            raise ValueError(
                f"'hyperparameters' and 'method.{self.method and self.method.type}.hyperparameters'"
                " differ; send only the latter"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_validation(self) -> "JobCreate":
        if self.validation_file is not None and self.validation_split:
            raise ValueError(
                "'validation_file' and 'validation_split' exclude each other; send only one of them"
            )
        return self

    @property
    def resolved_hyperparameters(self) -> Hyperparameters:
        if self.method and self.method.hyperparameters:
            return _three(self.method.hyperparameters)
        return self.hyperparameters or Hyperparameters()


class StreamOptions(Parameters):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


_IGNORED_IN_MESSAGES = {"refusal", "annotations", "audio", "reasoning_content", "function_call"}


def _plain_message(value: Any) -> Any:
    """Drop what an assistant message of an earlier answer carries along and no model reads."""
    if not isinstance(value, dict):
        return value
    plain = {
        key: item
        for key, item in value.items()
        if item is not None
        and key not in _IGNORED_IN_MESSAGES
        and (key, item) != ("tool_calls", [])
    }
    require_known(ChatMessage, plain)
    return plain


Message = Annotated[ChatMessage, BeforeValidator(_plain_message)]
"""A turn of a conversation as clients send it."""


Stop = (
    Annotated[Text, Field(min_length=1)]
    | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=4)]
)
Penalty = Annotated[Strict, Field(ge=-2, le=2)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class SamplingFields(Parameters):
    """How tokens are drawn: OpenAI's fields, then what other servers take as well (all optional).

    The latter come through the SDK's ``extra_body``.
    """

    temperature: Annotated[Strict, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Strict, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Annotated[Strict, Field(ge=-100, le=100)]] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: Any = None

    top_k: Annotated[StrictInt, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[Strict, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Strict, Field(gt=0, le=10)] | None = None
    ignore_eos: StrictBool | None = None

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(SamplingFields):
    """The body of ``POST /completions``: a text, or several, to continue without a template.

    A list of integers is token ids.
    """

    model: Text
    prompt: (
        Text
        | Annotated[list[StrictInt], Field(min_length=1)]
        | Annotated[
            list[Text] | list[Annotated[list[StrictInt], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    best_of: Annotated[StrictInt, Field(ge=1, le=20)] | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None
    suffix: Text | None = None

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("text before a suffix cannot be written by these models; leave it out")
        return value

    @model_validator(mode="after")
    def _best_of_fits(self) -> "CompletionRequest":
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise ValueError("'best_of' must be at least 'n'")
            if self.stream and self.best_of > (self.n or 1):
                raise ValueError("'best_of' cannot be streamed; leave it or 'stream' out")
        return self


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchemaFormat(Parameters):
    """OpenAI's ``json_schema``: `schema_` is on the wire ``schema``."""

    name: FunctionName
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class ResponseFormat(Parameters):
    """What an answer has to be: any text, a JSON object, or JSON that fulfils a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' belongs to the type 'json_schema', which needs it")
        return self

    @property
    def schema_of_text(self) -> JsonObject | None:
        """The JSON schema that the text has to fulfil."""
        if self.json_schema is not None:
            return self.json_schema.schema_ or {}
        return {"type": "object"} if self.type == "json_object" else None


class Function(BaseModel):
    """A function that the model may call; further keys reach the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    name: FunctionName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    """A tool; only functions can be called."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: Function


class NamedFunction(Parameters):
    name: FunctionName


class NamedTool(Parameters):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingFields):
    """The body of ``POST /chat/completions``.

    Fields that change nothing here are accepted and ignored, as OpenAI documents them as hints.
    Fields that would change the answer and are not supported are refused by `check_supported`.
    """

    model: Text
    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None

    functions: list[JsonObject] | None = None
    function_call: Any = None
    modalities: list[Text] | None = None
    audio: Any = None

    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None
    web_search_options: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: StrictBool | None = None
    metadata: Metadata | None = None
    moderation: Any = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self

    @model_validator(mode="after")
    def _calls_need_tools(self) -> "ChatRequest":
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("'tool_choice' needs 'tools'")
        return self

    def unsupported(self) -> str | None:
        """Return the name of a field that would change the answer in a way not supported here."""
        without_effect = {
            "functions": not self.functions,
            "function_call": self.function_call in (None, "none", "auto"),
            "modalities": self.modalities in (None, ["text"]),
            "audio": self.audio is None,
        }
        return next((name for name, fine in without_effect.items() if not fine), None)
