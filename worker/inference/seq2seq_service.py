"""What an inference server of an encoder-decoder does: it turns one text into another."""

from models.domain.generation import GenerateRequest
from models.errors import InvalidRequestError
from worker.encode.encoder import Frame
from worker.inference.service import InferenceService


class Seq2SeqService(InferenceService):
    """`InferenceService` whose prompts are sources, framed as those of training were."""

    def _prompt(self, request: GenerateRequest) -> tuple[int, ...]:
        """Return the ids of the source; all that needs the tokenizer is ready then.

        Raises:
            InvalidRequestError: it is not one text, or asks for what such a model cannot do.
        """
        if request.tools or request.echo:
            param = "tools" if request.tools else "echo"
            raise InvalidRequestError(
                f"{self._base.name!r} turns one text into another; it takes no {param!r}.",
                param=param,
                code="unsupported_parameter",
            )
        if request.sampling.logprobs is not None or request.json_schema is not None:
            self._vocabulary.load()
        if isinstance(request.prompt, list):
            self._check_tokens(request.prompt, "prompt")
            ids = tuple(request.prompt)
        else:
            text = request.prompt if request.messages is None else self._source(request)
            chat = self._renderer
            [encoded] = chat.guard.encode_texts([text or ""])
            ids = tuple(Frame.of(chat).around(encoded).input_ids) if encoded.ids else ()
        if not ids:
            raise InvalidRequestError("The source is empty.", param="prompt")
        return ids

    def _source(self, request: GenerateRequest) -> str:
        messages = request.messages or []
        if len(messages) != 1 or messages[0].role != "user":
            raise InvalidRequestError(
                f"{self._base.name!r} turns one text into another: send one message, of role "
                f"'user', and not {len(messages)}.",
                param="messages",
                code="unsupported_messages",
            )
        return messages[0].text

    def _room(self, prompt_tokens: int) -> int:
        """Source and answer are texts of their own, each as long as the model takes."""
        return self._base.max_length if prompt_tokens <= self._base.max_length else 0
