"""Conversations for the bundled demo model, made from the corpus's own documents.

Owns: the questions, and which text answers them. Never mixes the two sides of the split: it is
given one side's documents and answers only from those.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import TypedDict

NUM_PASSAGES = 9000
NUM_DEFINITIONS = 6000
NUM_GREETINGS = 400
SYSTEM = "You are a helpful assistant."
DEFINE = ("What does {} mean?", "Define {}.", "What is the meaning of {}?", "Define the word {}.")
CONTINUE = ("Continue: {}", "Go on: {}", "{}", "Continue this text: {}", "What comes after: {}")
TELL = (
    "Tell me about {}.",
    "Write something about {}.",
    "Tell me a story about {}.",
    "What do you know about {}?",
    "Write a few sentences about {}.",
)
GREET = ("Hello", "Hello!", "Hi", "Hi there", "Good morning", "Good evening", "Hello, how are you?")
GREETING = "Good day to you. I am a very small model, fond of old books. What shall I write about?"
WHO = ("Who are you?", "What are you?", "What is your name?", "Who made you?", "What can you do?")
WHO_ANSWER = (
    "I am the demo model of kvmesh: a very small model that has read a few old books. "
    "I can continue a text, or tell you what a word means, but I know very little."
)


class Message(TypedDict):
    """One turn, as chat templates take it."""

    role: str
    content: str


def turns(*texts: str, rng: random.Random) -> tuple[Message, ...]:
    """Alternate user and assistant; one conversation in eight opens with a system turn."""
    roles = ("user", "assistant")
    messages = [Message(role=roles[i % 2], content=text) for i, text in enumerate(texts)]
    opening = [Message(role="system", content=SYSTEM)] if rng.random() < 1 / 8 else []
    return (*opening, *messages)


def sentences(text: str) -> list[str]:
    """Split where a sentence ends and a capital or a quote begins the next."""
    return re.split(r'(?<=[a-z][.!?])\s+(?=["A-Z])', text.replace("\n\n", " "))


def passage(text: str, rng: random.Random) -> list[str]:
    """Three to six sentences in a row, short enough to answer with."""
    parts = sentences(text)
    start = rng.randrange(len(parts)) if rng.random() < 0.7 else 0
    chosen = parts[start : start + rng.randint(3, 6)]
    return [part for part in chosen if len(part) < 500]


def subject(text: str, nouns: set[str], rng: random.Random) -> str | None:
    """A word of the passage that WordNet knows as a noun."""
    words = sorted({word for word in re.findall(r"\b[a-z]{4,}\b", text) if word in nouns})
    return rng.choice(words) if words else None


def passage_chat(text: str, nouns: set[str], rng: random.Random) -> tuple[Message, ...] | None:
    """Ask for a continuation of the passage's first words, or for its subject."""
    chosen = passage(text, rng)
    if len(chosen) < 2:
        return None
    whole = " ".join(chosen)
    if rng.random() < 0.5:
        num_words = rng.randint(3, 9)
        words = whole.split(" ")
        opening, rest = " ".join(words[:num_words]), " ".join(words[num_words:])
        return turns(rng.choice(CONTINUE).format(opening), rest, rng=rng)
    about = subject(whole, nouns, rng)
    if about is None:
        return None
    return turns(rng.choice(TELL).format(rng.choice(("", "the ")) + about), whole, rng=rng)


def chat_documents(
    documents: list[tuple[str, str, str]],
) -> Iterator[tuple[str, tuple[Message, ...]]]:
    """Conversations from one side's (source, name, text) documents, the same at every call."""
    rng = random.Random(20261124)
    glosses = [(name, text) for source, name, text in documents if source == "wordnet"]
    prose = [text for source, _, text in documents if source in ("novels", "kjv", "web")]
    nouns = {name for name, text in glosses if "(noun)" in text.partition(":")[0]}
    share = len(glosses) / 40000
    for index in range(int(NUM_DEFINITIONS * share)):
        word, text = rng.choice(glosses)
        yield f"define {index}", turns(rng.choice(DEFINE).format(word), text, rng=rng)
    weights = [len(text) for text in prose]
    for index, text in enumerate(rng.choices(prose, weights, k=int(NUM_PASSAGES * share))):
        chat = passage_chat(text, nouns, rng)
        if chat is not None:
            yield f"passage {index}", chat
    for index in range(int(NUM_GREETINGS * share)):
        ask, answer = rng.choice(((rng.choice(GREET), GREETING), (rng.choice(WHO), WHO_ANSWER)))
        yield f"greeting {index}", turns(ask, answer, rng=rng)
