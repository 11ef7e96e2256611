"""Running text as token ids, ready to be cut into windows of the length that fits."""

from collections.abc import Sequence
from dataclasses import replace

from models.domain.rows import Row
from worker.chat import ChatRenderer
from worker.masker import Rendered
from worker.row_error import RowError


class DocumentRenderer:
    """Renders running text as ``ChatRenderer`` does; what is too long may become several rows.

    Each of them starts with the tokens that a text starts with; the end-of-text token is the last
    one's.
    """

    def __init__(self, chat: ChatRenderer) -> None:
        self._chat = chat

    def render_all(self, rows: Sequence[Row]) -> list[Rendered | RowError]:
        """Return the ids of each row, or why it has none."""
        n_start = len(self._chat.text_start)
        return [
            each if isinstance(each, RowError) else replace(each, frame=(n_start, 0), splits=True)
            for each in self._chat.render_all(rows)
        ]
