"""Rows of all forms as token ids; conversations and running text are ``worker.chat``'s."""
