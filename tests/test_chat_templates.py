"""Six families of chat templates: the mask is the assistant's words and its end token, exactly.

The templates were written from their published descriptions; the tokenizer is a real byte-level
BPE, trained here on a few sentences, with the special tokens of each family.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models.domain.rows import ChatRow
from worker.chat import ChatRenderer
from worker.row_error import RowError
from worker.training.batches import RowPolicy, build_dataset
from worker.training.objectives.base import Example

FOLDER = Path(__file__).parent / "chat_templates"
SENTENCES = [
    "How deep is the harbour? Four metres at low water. Who runs the crane? The yard does.",
    "水深はいくらですか。四メートルです。",
    "كم عمق الميناء؟ أربعة أمتار.",
    "🚤⚓ ahoy",
]


@dataclass(frozen=True)
class Family:
    """`end` closes a turn; `before` is what stands before the assistant's words in the prompt."""

    name: str
    special: list[str]
    end: str
    lead: str = ""


FAMILIES = [
    Family("chatml", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    Family(
        "llama3",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    Family("gemma", ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    Family("mistral", ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", lead=" "),
    Family("qwen", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    Family("zephyr", ["</s>", "<|user|>", "<|assistant|>", "<|system|>"], "</s>"),
]


def make_renderer(family: Family) -> tuple[ChatRenderer, PreTrainedTokenizerFast]:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=family.special,
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=family.end)
    tokenizer.add_special_tokens({"additional_special_tokens": family.special})
    tokenizer.chat_template = (FOLDER / f"{family.name}.jinja").read_text()
    return ChatRenderer(tokenizer), tokenizer


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


def chat(*turns: str, **more: Any) -> ChatRow:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)]
    return ChatRow.model_validate({"messages": messages, **more})


def learned(renderer: ChatRenderer, tokenizer: PreTrainedTokenizerFast, row: ChatRow) -> list[str]:
    """Return the text of each stretch of trained ids."""
    rendered = renderer.render(row)
    stretches: list[list[int]] = []
    before = False
    for token, trained in zip(rendered.input_ids, rendered.trained, strict=True):
        if trained and not before:
            stretches.append([])
        if trained:
            stretches[-1].append(token)
        before = trained
    return [str(tokenizer.decode(stretch)) for stretch in stretches]


def test_the_mask_is_every_answer_with_its_end_token(family: Family) -> None:
    renderer, tokenizer = make_renderer(family)
    row = chat("How deep?", "Four metres.", "Who runs it?", "The yard does.")
    assert learned(renderer, tokenizer, row) == [
        f"{family.lead}Four metres.{family.end}",
        f"{family.lead}The yard does.{family.end}",
    ]


def test_an_answer_of_weight_0_is_context_only(family: Family) -> None:
    renderer, tokenizer = make_renderer(family)
    row = chat("How deep?", "Four metres.", "Who runs it?", "The yard does.")
    first = row.messages[1].model_copy(update={"weight": 0})
    row = row.model_copy(update={"messages": [row.messages[0], first, *row.messages[2:]]})
    assert learned(renderer, tokenizer, row) == [f"{family.lead}The yard does.{family.end}"]


def test_every_script_survives_and_training_sees_the_same_ids(family: Family) -> None:
    renderer, tokenizer = make_renderer(family)
    answers = ["四メートル🚤です。", "أربعة أمتار", "👩‍👩‍👧 ok"]
    row = chat("水深は?", answers[0], "كم العمق؟", answers[1], "👋", answers[2])
    assert learned(renderer, tokenizer, row) == [
        f"{family.lead}{answer}{family.end}" for answer in answers
    ]
    examples: list[Example] = []
    build_dataset([(1, row)], renderer, RowPolicy("fail", "error", 4096), "training_file", examples)
    shown = renderer.render(row)
    digests = {
        hashlib.sha256(repr((list(ids), list(trained))).encode()).hexdigest()
        for ids, trained in (
            (shown.input_ids, shown.trained),
            (examples[0].input_ids.tolist(), examples[0].trained.tolist()),
        )
    }
    assert len(digests) == 1


def test_a_special_token_that_a_person_types_stays_text(family: Family) -> None:
    renderer, tokenizer = make_renderer(family)
    typed = f"Say {family.end} twice."
    rendered = renderer.render(chat(typed, f"I say {family.end} now."))
    end_id = int(tokenizer.get_vocab()[family.end])
    plain = renderer.render(chat("Say x twice.", "I say x now."))
    assert rendered.input_ids.count(end_id) == plain.input_ids.count(end_id)
    assert learned(renderer, tokenizer, chat("a", f"I say {family.end} now.")) == [
        f"{family.lead}I say {family.end} now.{family.end}"
    ]


def test_the_served_prompt_is_what_stood_before_the_answer(family: Family) -> None:
    renderer, _ = make_renderer(family)
    row = chat("How deep?", "Four metres.", "Who runs it?", "The yard does.")
    rendered = renderer.render(row)
    prompt = renderer.prompt_ids(row.messages[:3])
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.trained[len(prompt)]
    assert not rendered.trained[len(prompt) - 1]


CALL = {"id": "c", "type": "function", "function": {"name": "depth", "arguments": '{"pier": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "depth", "parameters": {"type": "object"}}}]
WITH_TOOLS = ChatRow.model_validate(
    {
        "messages": [
            {"role": "user", "content": "How deep at pier 2?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "4"},
            {"role": "assistant", "content": "Four metres."},
        ],
        "tools": TOOLS,
    }
)


def test_tool_calls_are_learned_and_their_results_are_not() -> None:
    renderer, tokenizer = make_renderer(FAMILIES[4])
    assert learned(renderer, tokenizer, WITH_TOOLS) == [
        '\n<tool_call>\n{"name": "depth", "arguments": {"pier": 2}}\n</tool_call><|im_end|>',
        "Four metres.<|im_end|>",
    ]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "zephyr"])
def test_a_template_that_ignores_tools_refuses_rows_with_them(name: str) -> None:
    renderer, _ = make_renderer(next(each for each in FAMILIES if each.name == name))
    with pytest.raises(RowError) as refused:
        renderer.render(WITH_TOOLS)
    assert refused.value.code in {"template_without_tools", "template_error"}
    assert refused.value.hint


def test_what_a_template_refuses_is_told_with_its_words() -> None:
    renderer, _ = make_renderer(FAMILIES[2])
    row = ChatRow.model_validate(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        }
    )
    with pytest.raises(RowError, match="System role not supported") as refused:
        renderer.render(row)
    assert refused.value.code == "template_error"
