"""A text to stream in the demo.

``alice.txt`` opens *Alice's Adventures in Wonderland* by Lewis Carroll, London: Macmillan, 1865:
chapter I and the beginning of chapter II.  The author died in 1898; the text is in the public
domain.
"""

from importlib.resources import files


def text() -> str:
    """Return the demo text: paragraphs of one line each, separated by empty lines."""
    return (files(__package__) / "alice.txt").read_text("utf-8")
