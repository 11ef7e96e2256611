"""Preference pairs as token ids: one conversation with either answer, as it would be served."""

from collections.abc import Sequence

from models.domain.rows import ChatMessage, ChatRow, PreferenceRow, Row
from worker.chat import ChatRenderer
from worker.masker import Rendered
from worker.row_error import RowError


class PairRenderer:
    """Renders a `PreferenceRow` as two sequences: the preferred answer's, then the other's.

    Trained are the two answers alone, each through its end-of-turn token.
    """

    def __init__(self, chat: ChatRenderer) -> None:
        self._chat = chat

    def render_all(self, rows: Sequence[Row]) -> list[Rendered | RowError]:
        """Return the ids of each row, or why it has none."""
        conversations: list[Row] = []
        for row in rows:
            if isinstance(row, PreferenceRow):
                conversations += [_with(row, row.preferred), _with(row, row.rejected)]
        halves = iter(self._chat.render_all(conversations))
        return [
            _join(next(halves), next(halves)) if isinstance(row, PreferenceRow) else _no_pair(row)
            for row in rows
        ]


def _with(row: PreferenceRow, answer: ChatMessage) -> ChatRow:
    context = [
        message.model_copy(update={"weight": 0}) if message.role == "assistant" else message
        for message in row.messages
    ]
    answer = answer.model_copy(update={"weight": None})
    return ChatRow(messages=[*context, answer], tools=row.tools)


def _join(preferred: Rendered | RowError, rejected: Rendered | RowError) -> Rendered | RowError:
    if isinstance(preferred, RowError):
        return preferred
    if isinstance(rejected, RowError):
        return rejected
    return Rendered(
        preferred.input_ids + rejected.input_ids,
        preferred.trained + rejected.trained,
        parts=(len(preferred.input_ids), len(rejected.input_ids)),
        weight=1,
    )


def _no_pair(row: Row) -> RowError:
    return RowError("unsupported_form", f"a {row.form} row has no two answers to compare.")
