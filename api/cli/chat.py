"""``tunery chat``: one answer, or a dialogue, streamed to the terminal."""

from typing import Any

from rich.console import Console

from api.cli.client import Client


def say(
    client: Client, body: dict[str, Any], messages: list[dict[str, Any]], console: Console
) -> str:
    """Stream the answer to `messages` to the terminal, and return it."""
    answer = ""
    for event in client.stream("/chat/completions", body | {"messages": messages, "stream": True}):
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                answer += text
                console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return answer


def converse(
    client: Client, body: dict[str, Any], messages: list[dict[str, Any]], console: Console
) -> None:
    """Hold a dialogue until end of input; the conversation is kept."""
    console.print(f"Talking to {body['model']}. Ctrl-D ends.", highlight=False)
    while True:
        try:
            question = console.input("[bold]you>[/bold] ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": say(client, body, messages, console)})
