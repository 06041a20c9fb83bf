"""Join the log messages of several layers into one message."""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"\d+")
_LAYER_MESSAGE = re.compile(r"[^\d{}]*\blayer \d+\b[^{}]*")


class LayerMessages:
    """Collect messages that differ only in their numbers; the first number is the layer index."""

    def __init__(self) -> None:
        self._messages: dict[str, list[list[int]]] = {}

    def add(self, message: str) -> bool:
        """Collect the message if it names a layer (`... layer 3: ...`), and return whether it was collected."""
        if _LAYER_MESSAGE.fullmatch(message) is None:
            return False
        numbers = [int(number) for number in _NUMBER.findall(message)]
        self._messages.setdefault(_NUMBER.sub("{}", message), []).append(numbers)
        return True

    def take(self) -> list[str]:
        """Return the joined messages and clear the collection."""
        messages = [_fold(template, rows) for template, rows in self._messages.items()]
        self._messages.clear()
        return messages


def _fold(template: str, rows: Sequence[Sequence[int]]) -> str:
    """Fill a template with the layers and the ranges of the other numbers."""
    if len(rows) > 1:
        template = template.replace("layer {}", "layers {}", 1)
    layers, *others = zip(*rows, strict=True)
    ranges = [_range(min(numbers), max(numbers)) for numbers in others]
    return template.format(_spans(layers), *ranges)


def _spans(numbers: Iterable[int]) -> str:
    """Format numbers as ranges, such as `0-3, 5`."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(_range(first, last) for first, last in spans)


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"
