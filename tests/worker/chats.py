"""Conversations and chat templates for the tests of the renderer."""

import copy

from transformers import PreTrainedTokenizerBase

from models.domain.rows import ChatMessage
from worker.masker import Rendered

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
STRIPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTS_MESSAGES = "{{ messages | length }}" + CHATML
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set text = m.content if loop.last else m.content.split('</think>')[-1] %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ text }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ text }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEVER_ENDS = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None
) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def talk(*contents: str, system: str | None = None) -> list[ChatMessage]:
    """Return a conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    turns = [
        ChatMessage.model_validate({"role": roles[index % 2], "content": content})
        for index, content in enumerate(contents)
    ]
    return [ChatMessage(role="system", content=system), *turns] if system else turns


def weighted(message: ChatMessage, weight: int) -> ChatMessage:
    return ChatMessage.model_validate(message.model_dump() | {"weight": weight})


def trained_text(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> str:
    pairs = zip(rendered.input_ids, rendered.trained, strict=True)
    return str(tokenizer.decode([token for token, trained in pairs if trained]))
