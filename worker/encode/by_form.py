"""Rows of any form as token ids, for showing and counting them: no objective is chosen yet."""

from typing import TYPE_CHECKING

from models.domain.rows import (
    ChoiceRow,
    LabelledRow,
    PairRow,
    PreferenceRow,
    Row,
    Seq2SeqRow,
    TextRow,
)
from worker.chat import ChatRenderer
from worker.encode.choices import ChoiceRenderer
from worker.encode.encoder import (
    ClassRenderer,
    MaskableRenderer,
    SentencePairRenderer,
    SourceTargetRenderer,
)
from worker.encode.pairs import PairRenderer
from worker.masker import Rendered
from worker.row_error import RowError

if TYPE_CHECKING:
    from worker.training.batches import Renderer


class FormRenderer:
    """Renders each row as the objectives of its form do; labels are left out.

    Args:
        chat: Of the tokenizer. Of one that has a mask token, texts are read as an encoder does.
    """

    def __init__(self, chat: ChatRenderer) -> None:
        self._chat = chat
        self._reads_only = chat.tokenizer.mask_token is not None
        self._made: dict[type, Renderer] = {}

    def render(self, row: Row) -> Rendered:
        """Return the ids of a row, several sequences one after another.

        Raises:
            RowError: it has none.
        """
        if type(row) not in self._made:
            self._made[type(row)] = self._renderer_of(row)
        [found] = self._made[type(row)].render_all([row])
        if isinstance(found, RowError):
            raise found
        return found

    def _renderer_of(self, row: Row) -> "Renderer":
        match row:
            case PreferenceRow():
                return PairRenderer(self._chat)
            case ChoiceRow():
                return ChoiceRenderer(self._chat)
            case LabelledRow():
                return ClassRenderer(self._chat, lambda _: (0.0,))
            case PairRow():
                return SentencePairRenderer(self._chat)
            case Seq2SeqRow():
                return SourceTargetRenderer(self._chat)
            case TextRow() if self._reads_only:
                return MaskableRenderer(self._chat, 1.0, whole_words=False)
        return self._chat
