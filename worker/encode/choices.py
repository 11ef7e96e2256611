"""Multiple choice as token ids: the question, answered with each choice, the right one first."""

from collections.abc import Sequence

from models.domain.rows import ChatMessage, ChatRow, ChoiceRow, Row
from worker.chat import ChatRenderer
from worker.masker import Rendered
from worker.row_error import RowError


class ChoiceRenderer:
    """Renders a `ChoiceRow` as one conversation for each choice; trained are the choices alone."""

    def __init__(self, chat: ChatRenderer) -> None:
        self._chat = chat

    def render_all(self, rows: Sequence[Row]) -> list[Rendered | RowError]:
        """Return the ids of each row, or why it has none."""
        choices = [_right_first(row) if isinstance(row, ChoiceRow) else [] for row in rows]
        conversations: list[Row] = [
            ChatRow(
                messages=[
                    ChatMessage(role="user", content=row.question),
                    ChatMessage(role="assistant", content=choice),
                ]
            )
            for row, texts in zip(rows, choices, strict=True)
            if isinstance(row, ChoiceRow)
            for choice in texts
        ]
        rendered = iter(self._chat.render_all(conversations))
        return [
            _join([next(rendered) for _ in texts])
            if texts
            else RowError("unsupported_form", f"a {row.form} row has no choices.")
            for row, texts in zip(rows, choices, strict=True)
        ]


def _right_first(row: ChoiceRow) -> list[str]:
    wrong = [choice for at, choice in enumerate(row.choices) if at != row.answer]
    return [row.choices[row.answer], *wrong]


def _join(choices: list[Rendered | RowError]) -> Rendered | RowError:
    good: list[Rendered] = []
    for each in choices:
        if isinstance(each, RowError):
            return each
        good.append(each)
    return Rendered(
        [token for each in good for token in each.input_ids],
        [yes for each in good for yes in each.trained],
        parts=tuple(len(each.input_ids) for each in good),
        weight=1,
    )
