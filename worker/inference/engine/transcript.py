"""What the tokens of one answer have become: text that is final, and when the answer is over."""

from dataclasses import replace

from worker.inference.engine.params import FinishReason, Sampling, TokenLogprobs
from worker.inference.engine.stream import TextStream


class Transcript:
    """Takes the tokens of one answer, whoever drew them.

    Args:
        sampling: How many tokens there may be, and what is wanted of them.
        text: What turns them into text.
    """

    def __init__(self, sampling: Sampling, text: TextStream) -> None:
        self.n_tokens = 0
        """Tokens so far, the end token included."""
        self._sampling = sampling
        self._text = text
        self._logprobs: list[TokenLogprobs] = []  # of tokens whose text is not final yet

    def push(
        self, drawn: TokenLogprobs, *, is_end: bool, is_over: bool = False
    ) -> tuple[str, FinishReason | None, tuple[TokenLogprobs, ...]]:
        """Return the text that became final, why the answer ends, and the final log-probabilities.

        Args:
            drawn: The next token.
            is_end: Whether it is an end token, which is no text.
            is_over: Whether nothing may follow it.
        """
        self.n_tokens += 1
        ends = is_end and not self._sampling.ignore_eos
        reason: FinishReason | None = "stop" if ends else None
        text = ""
        if self._sampling.logprobs is not None and not ends:
            self._logprobs.append(replace(drawn, offset=self._text.n_seen))
        if not is_end:
            text, stopped = self._text.push(drawn.token)
            if stopped or is_over:
                reason = "stop"
        if reason is None and self.n_tokens >= self._sampling.max_tokens:
            reason = "length"
        if reason is not None:
            text += self._text.finish()
        return text, reason, self._final_logprobs(reason)

    def finish(self, reason: FinishReason) -> tuple[str, tuple[TokenLogprobs, ...]]:
        """Return what was held back, where the answer ends for another reason than a token."""
        return self._text.finish(), self._final_logprobs(reason)

    def _final_logprobs(self, reason: FinishReason | None) -> tuple[TokenLogprobs, ...]:
        """Take out the log-probabilities of tokens whose text has become final."""
        if not self._logprobs:
            return ()
        end = self._text.n_out
        everything = reason is not None and not self._text.was_cut
        final = tuple(each for each in self._logprobs if everything or each.offset < end)
        self._logprobs = self._logprobs[len(final) :]
        return final
