"""How numbers, sizes and times are written on the page."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from jinja2 import pass_context
from jinja2.runtime import Context
from markupsafe import Markup

THIN_SPACE = "\u202f"


def number(value: float | None) -> str:
    """Write an integer with thin spaces, anything else with about four digits."""
    if value is None:
        return "–"
    if float(value).is_integer():
        return f"{int(value):,}".replace(",", THIN_SPACE)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", THIN_SPACE)


def size(n_bytes: float | None) -> str:
    """Write a size in SI units."""
    if n_bytes is None:
        return "–"
    value, unit = float(n_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def duration(seconds: float | None) -> str:
    """Write a duration in its two largest units."""
    if seconds is None:
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def moment(when: float | None, t: Callable[..., str] = str.format) -> Markup:
    """Write how long ago a moment is, with the exact time as a tooltip."""
    if when is None:
        return Markup("–")
    exact = datetime.fromtimestamp(when, UTC)
    ago = duration(time.time() - when).split(" ")
    return Markup('<time datetime="{}" title="{} UTC">{}</time>').format(
        exact.isoformat(),
        exact.strftime("%Y-%m-%d %H:%M:%S"),
        t("{time} ago", time=" ".join(ago[:2])),
    )


@pass_context
def _moment(context: Context, when: float | None) -> Markup:
    return moment(when, context["t"])


def day(when: float) -> str:
    """Write the day of a moment (UTC)."""
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d")


ALL = {"number": number, "size": size, "duration": duration, "moment": _moment, "day": day}
