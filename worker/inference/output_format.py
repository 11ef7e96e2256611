"""What an answer has to look like, as a grammar: a JSON schema, or calls of tools.

The grammars are in llguidance's dialect of Lark, in which ``%json`` is a JSON schema and ``<[5]>``
the token 5.
"""

import json
from collections.abc import Callable

from models.domain.base import JsonObject
from models.domain.generation import GenerateRequest, ToolName
from models.errors import InvalidRequestError
from worker.inference.engine.grammar import Grammar, GrammarError, Vocabulary
from worker.tool_syntax import Pieces, ToolSyntax

_JSON = {"whitespace_pattern": r"[ \n\r\t]{0,40}"}
"""White space is free, as data sets have it, but never endless: a model can be caught in it."""

MAX_SCHEMA_CHARACTERS = 200_000


def names_of(tools: list[JsonObject] | None) -> list[str]:
    """Return the names of the functions in `tools`.

    Raises:
        InvalidRequestError: a tool is no function with a name.
    """
    names = []
    for index, tool in enumerate(tools or []):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise InvalidRequestError(
                f"tools[{index}] is no function with a name. Write "
                '{"type": "function", "function": {"name": …, "parameters": …}}.',
                param=f"tools[{index}]",
            )
        names.append(name)
    return names


def grammar_of(
    request: GenerateRequest, syntax: Callable[[], ToolSyntax], vocabulary: Vocabulary
) -> Grammar | None:
    """Return what the answers to `request` are held to, None where they may be anything.

    Args:
        syntax: How the base model writes calls.

    Raises:
        InvalidRequestError: a schema cannot be followed (`param` says which), or the tool that has
            to be called is not there.
    """
    names = names_of(request.tools)
    must_call = request.tool_choice != "auto"
    if must_call and not names:
        raise InvalidRequestError(
            "'tool_choice' asks for a call, but there are no tools.", param="tool_choice"
        )
    if not must_call and request.json_schema is None:
        return None
    parts, rules = [], []
    if request.json_schema is not None and not must_call:
        parts.append("text")
        rules.append(f"text: %json {_schema(request.json_schema, vocabulary, 'response_format')}")
    if names:
        parts.append("calls")
        rules += _call_rules(request, syntax(), vocabulary)
    return vocabulary.compile("\n".join([f"start: {' | '.join(parts)}", *rules]))


def _call_rules(request: GenerateRequest, syntax: ToolSyntax, vocabulary: Vocabulary) -> list[str]:
    wanted = request.tool_choice.name if isinstance(request.tool_choice, ToolName) else None
    chosen, rules = [], []
    for index, tool in enumerate(request.tools or []):
        function = tool["function"]
        if wanted is not None and function["name"] != wanted:
            continue
        where = f"tools[{index}].function.parameters"
        schema = function.get("parameters") or {"type": "object"}
        head = syntax.before_name + json.dumps(function["name"])[1:-1] + syntax.between
        rules.append(f"arguments_{index}: %json {_schema(schema, vocabulary, where)}")
        rules.append(f"tool_{index}: {_text(head)} arguments_{index} {_text(syntax.after)}")
        chosen.append(f"tool_{index}")
    if not chosen:
        raise InvalidRequestError(
            f"'tool_choice' names {wanted!r}, which is none of the tools.", param="tool_choice"
        )
    opening, closing = _pieces(syntax.opening), _pieces(syntax.closing)
    several = request.parallel_tool_calls and syntax.separator is not None
    more = f"({_text(syntax.separator or '')} call)*" if several else ""
    one_of = " | ".join(chosen)
    if syntax.is_list:
        return [*rules, f"calls: {opening} call {more} {closing}", f"call: {one_of}"]
    return [*rules, f"calls: call {more}", f"call: {opening} ({one_of}) {closing}"]


def _schema(schema: JsonObject, vocabulary: Vocabulary, param: str) -> str:
    """Return the source of a schema that can be followed."""
    source = json.dumps({**schema, "x-guidance": _JSON}, ensure_ascii=False)
    if len(source) > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequestError(
            f"The schema has {len(source):,} characters; {MAX_SCHEMA_CHARACTERS:,} are allowed.",
            param=param,
        )
    try:
        vocabulary.compile(f"start: %json {source}")
    except GrammarError as error:
        raise InvalidRequestError(
            f"This JSON schema cannot be followed: {error} Change or remove that part.",
            param=param,
            code="invalid_json_schema",
        ) from None
    return source


def _pieces(pieces: Pieces) -> str:
    return " ".join(f"<[{piece}]>" if isinstance(piece, int) else _text(piece) for piece in pieces)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
