"""Shows what a recipe trains on, token by token: whether it is in the loss, its group, its score."""

from .page import page_settings, render_page
from .probabilities import add_probabilities, starting_model_options
from .rows import parse_range, read_view
from .text import render_text


__all__ = [
    "add_probabilities",
    "page_settings",
    "parse_range",
    "read_view",
    "render_page",
    "render_text",
    "starting_model_options",
]
