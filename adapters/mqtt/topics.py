"""Which camera a topic belongs to: the levels that a filter's wildcards match."""

from __future__ import annotations

from adapters.mqtt.connection import checked_topic
from engine.errors import ConfigError

Levels = tuple[str, ...]  # of a topic, where a filter has wildcards; () where it has none


class TopicFilter:
    """A filter of topics (MQTT 5, section 4.7): ``+`` is any level, ``#`` all that follow."""

    def __init__(self, text: str) -> None:
        """Takes a filter that is valid."""
        self.text = text
        self._levels = text.split("/")

    @property
    def num_wildcards(self) -> int:
        """How many levels are wildcards."""
        return sum(level in {"+", "#"} for level in self._levels)

    def match(self, topic: str) -> Levels | None:
        """The levels of a topic that wildcards stand for, or None when it does not match."""
        levels = topic.split("/")
        matched: list[str] = []
        for place, wanted in enumerate(self._levels):
            if wanted == "#":
                return (*matched, "/".join(levels[place:]))
            if place >= len(levels) or wanted not in {"+", levels[place]}:
                return None
            if wanted == "+":
                matched.append(levels[place])
        return tuple(matched) if len(levels) == len(self._levels) else None


def telemetry_filter(frames: TopicFilter, configured: str) -> TopicFilter:
    """Where positions come: as configured, or beside the frames on ``.../telemetry``.

    Raises:
        ConfigError: what is configured is no topic.
    """
    if configured:
        try:
            return TopicFilter(checked_topic(configured))
        except ValueError as error:
            raise ConfigError(f"mqtt.telemetry_topic: {error}") from error
    return TopicFilter("/".join([*frames.text.split("/")[:-1], "telemetry"]))


def printable(topic: str, *, max_chars: int | None = None) -> str:
    """A topic for logs and keys: without what a terminal would obey, and perhaps shortened."""
    text = "".join(char if char.isprintable() else "_" for char in topic[:max_chars])
    return text if max_chars is None or len(topic) <= max_chars else f"{text}..."
