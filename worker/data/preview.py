"""What a model will learn from rows: their text, their tokens, which of these are trained.

Everything comes from the renderer that trains (``worker.chat``): what is shown is learned.
"""

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import orjson
from pydantic import Field

from models.domain.base import Frozen, JsonObject
from models.domain.estimates import sample_of
from models.domain.rows import Row
from worker.data.normalised import canonical
from worker.row_error import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from worker.masker import Rendered

BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Upper ends of the histogram's bins, in tokens; longer rows are in the last one as well."""


class Renderer(Protocol):
    """The part of ``worker.chat.ChatRenderer`` that is needed here."""

    def render(self, row: Row) -> "Rendered": ...


class Span(Frozen):
    """A stretch of tokens ``[start, end)`` that are all trained or all not, and its text."""

    start: int
    end: int
    trained: bool
    text: str


class RowPreview(Frozen):
    """One row as a model sees it; `fault` says why it cannot be rendered."""

    line: int
    row: JsonObject
    input_ids: list[int] = Field(default_factory=list)
    spans: list[Span] = Field(default_factory=list)
    n_tokens: int = 0
    n_trained: int = 0
    truncated: bool = False
    fault: str = ""


class TokenStatistics(Frozen):
    """Tokens of all rows; `histogram` counts rows by the upper end of their bin.

    `lengths` is a sample in ascending order (``models.domain.estimates.sample_of``).
    """

    n_rows: int = 0
    n_faulty: int = 0
    n_tokens: int = 0
    n_trained: int = 0
    longest: int = 0
    n_overlong: int = 0
    histogram: dict[int, int] = Field(default_factory=dict)
    lengths: list[int] = Field(default_factory=list)


def preview_row(
    line: int,
    row: Row,
    renderer: Renderer,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> RowPreview:
    """Return one row as it will be trained; what exceeds `max_length` tokens is cut off."""
    plain: JsonObject = orjson.loads(canonical(row))
    try:
        rendered = renderer.render(row)
    except RowError as error:
        return RowPreview(line=line, row=plain, fault=error.finding(line).sentence())
    ids = rendered.input_ids[:max_length]
    trained = rendered.trained[:max_length]
    spans: list[Span] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            text = str(tokenizer.decode(ids[start:end]))
            spans.append(Span(start=start, end=end, trained=trained[start], text=text))
            start = end
    return RowPreview(
        line=line,
        row=plain,
        input_ids=ids,
        spans=spans,
        n_tokens=len(rendered.input_ids),
        n_trained=sum(trained),
        truncated=len(rendered.input_ids) > max_length,
    )


def count_tokens(
    rows: Iterable[tuple[int, Row]], renderer: Renderer, max_length: int
) -> TokenStatistics:
    """Render every row and add up; only numbers are held in memory."""
    lengths = array("L")
    n_rows = n_faulty = n_tokens = n_trained = longest = n_overlong = 0
    histogram = dict.fromkeys(BINS, 0)
    for _, row in rows:
        n_rows += 1
        try:
            rendered = renderer.render(row)
        except RowError:
            n_faulty += 1
            continue
        length = len(rendered.input_ids)
        lengths.append(length)
        n_tokens += length
        n_trained += sum(rendered.trained[:max_length])
        longest = max(longest, length)
        n_overlong += length > max_length
        histogram[next((end for end in BINS if length <= end), BINS[-1])] += 1
    return TokenStatistics(
        n_rows=n_rows,
        n_faulty=n_faulty,
        n_tokens=n_tokens,
        n_trained=n_trained,
        longest=longest,
        n_overlong=n_overlong,
        histogram={end: count for end, count in histogram.items() if count},
        lengths=sample_of(lengths),
    )
