"""What a recipe trains on, token by token: in the loss or not, the group, the score."""

from ..launch.preparation import load_recipe, prepare, prepare_view
from .page import page_settings, render_page
from .rows import parse_range, read_view
from .text import render_text


__all__ = [
    "load_recipe",
    "page_settings",
    "parse_range",
    "prepare",
    "prepare_view",
    "read_view",
    "render_page",
    "render_text",
]
