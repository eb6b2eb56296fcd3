"""A conversation that is too long for the context -> the same without its oldest rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from serving.generation.interface import Conversation, Message


def drop_oldest(conversation: Conversation, fits: Callable[[Conversation], bool]) -> tuple[Conversation, int] | None:
    """The conversation without as few of its oldest rounds as make it fit, and their number; None if none would do.

    A round is a question with everything up to the next one: answers, calls of tools and their results. System
    messages stay, and so does the last question. `fits` renders, so it is called a logarithmic number of times.
    """
    starts = _round_starts(conversation.messages)
    fewest, most = 1, len(starts) - 1
    if most < 1 or not fits(_without(conversation, starts[most])):
        return None
    while fewest < most:
        middle = (fewest + most) // 2
        if fits(_without(conversation, starts[middle])):
            most = middle
        else:
            fewest = middle + 1
    return _without(conversation, starts[fewest]), fewest


def _round_starts(messages: tuple[Message, ...]) -> list[int]:
    """Where each round begins: at the first message, and at every user message that follows another role's."""
    turns = [i for i, message in enumerate(messages) if message.role != "system"]
    questions = [j for i, j in pairwise(turns) if messages[j].role == "user" and messages[i].role != "user"]
    return [0, *questions]


def _without(conversation: Conversation, start: int) -> Conversation:
    """The messages from `start` on, after the system messages in front of them."""
    system = tuple(message for message in conversation.messages[:start] if message.role == "system")
    return replace(conversation, messages=system + conversation.messages[start:])
