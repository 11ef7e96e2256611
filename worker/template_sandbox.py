"""The sandbox of chat templates: what they may call, and how much memory and time they may take.

It gives the names, filters and tags that ``transformers`` gives (``raise_exception``,
``strftime_now``, ``tojson``, ``namespace``, ``break``, ``continue``, ``generation``). On top of
``jinja2``'s sandbox every operation that can make a value grow is bounded, loops and macros are
counted, and the running time is watched.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT = 4 << 20
"""Most characters of a template's output, and of any string on the way there."""
MAX_NUMBER = 100_000
"""Largest width, count or exponent; also the longest ``range`` of ``jinja2``'s sandbox."""
MAX_STEPS = 1_000_000
"""Most turns of loops and calls of macros in one rendering."""
MAX_SECONDS = 10.0

_WIDE_FORMAT = re.compile(r"[0-9]{5}|\*|\{[^{}]*:[^{}]*\{")


class TemplateLimitError(TemplateError):
    """The template would use more memory or time than a template may."""


@dataclass(slots=True)
class Run:
    """One rendering: its budget, and the marks that go around ``generation`` blocks."""

    deadline: float
    marks: tuple[str, str] | None
    n_steps: int = 0


_run: ContextVar[Run] = ContextVar("chat_template_run")


@contextmanager
def running(marks: tuple[str, str] | None = None) -> Iterator[None]:
    """Give the templates rendered inside a fresh budget."""
    token = _run.set(Run(time.monotonic() + MAX_SECONDS, marks))
    try:
        yield
    finally:
        _run.reset(token)


def check_size(size: int) -> None:
    """Raise TemplateLimitError for a text or list of more than `MAX_TEXT` elements."""
    if size > MAX_TEXT:
        raise TemplateLimitError(f"it makes a value of more than {MAX_TEXT:,} characters")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled in."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
        )
        for name in _GROWING & self.filters.keys():
            self.filters[name] = _bounded_filter(name, self.filters[name])
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _Namespace,
        }

    def step(self) -> str:
        """Count one turn of a loop or one call of a macro."""
        run = _run.get()
        run.n_steps += 1
        if run.n_steps > MAX_STEPS:
            raise TemplateLimitError(f"its loops turn more than {MAX_STEPS:,} times")
        if run.n_steps % 256 == 0 and time.monotonic() > run.deadline:
            raise TemplateLimitError(f"it runs for more than {MAX_SECONDS:.0f} seconds")
        return ""

    def concat_bounded(self, *parts: object) -> str:
        """Join the operands of ``~``."""
        texts = [str(part) for part in parts]
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            check_size(len(left) + len(right))
            return left + right
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    check_size(len(one) * other)
        elif operator == "**":
            _check_number(left)
            _check_number(right * 1000)  # two digits: no exponent that a template needs has more
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple):
            check_size(len(result))
        elif isinstance(result, int):
            check_size(result.bit_length())
        return result

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        subject = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        if isinstance(subject, str) and name in _GROWING:
            if name == "join":
                args = (list(map(str, *args)),)
                _check_growth(name, args[0], [subject])
            else:
                _check_growth(name, subject, [*args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Bounded().visit(super()._parse(source, name, filename))
        return template


_GROWING = frozenset(
    {"batch", "center", "expandtabs", "format", "indent", "join"}
    | {"ljust", "replace", "rjust", "slice", "wordwrap", "zfill"}
)
"""Filters and methods of strings whose result can be far larger than what they are given."""


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        subject = args[first]
        if name == "join" and not isinstance(subject, str):
            subject = list(subject)
            args = (*args[:first], subject, *args[first + 1 :])
        _check_growth(name, subject, [*args[first + 1 :], *kwargs.values()])
        return function(*args, **kwargs)

    return bounded


def _check_growth(name: str, subject: Any, arguments: list[Any]) -> None:
    for argument in arguments:
        _check_number(argument)
    numbers = [each for each in arguments if isinstance(each, int)]
    texts = [each for each in arguments if isinstance(each, str)]
    if name == "join":
        check_size(sum(len(str(part)) for part in subject))
        check_size(sum(map(len, texts)) * len(subject))
    elif name == "replace" and len(texts) > 1:
        text = str(subject)
        check_size(len(text) + text.count(texts[0]) * len(texts[1]))
    elif name == "format":
        _check_format(str(subject))
    elif name == "expandtabs":
        check_size(len(subject) + subject.count("\t") * max(numbers, default=8))
    elif name == "indent":
        text = str(subject)
        widths = [*numbers, *map(len, texts), 4]
        check_size(len(text) + (text.count("\n") + 1) * max(widths))


def _check_number(value: object) -> None:
    if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        raise TemplateLimitError(f"it uses a width or count above {MAX_NUMBER:,}")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateLimitError("it formats text with a width that is too large or not fixed")


class _Bounded(NodeTransformer):
    """Rewrites a parsed template so that loops, macros and ``~`` ask the environment first."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._with_step(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._with_step(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concat_bounded", node.nodes, node.lineno)

    def _with_step(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.ExprStmt(_call("step", [], node.lineno), lineno=node.lineno)
        node.body.insert(0, step)
        return node


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}``: text that the model writes itself."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        marks = _run.get().marks
        text = caller()
        return text if marks is None else f"{marks[0]}{text}{marks[1]}"


class _Namespace(Namespace):
    """A namespace whose attributes cannot reach Python's own."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *others = args
        attributes = dict(*others, **attributes)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace cannot have the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    _check_format(form)
    return datetime.now().strftime(form)


def _to_json(
    value: Iterable[object] | str | float | None,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as ``transformers`` writes it: no HTML escapes, and characters as they are."""
    _check_number(indent)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
