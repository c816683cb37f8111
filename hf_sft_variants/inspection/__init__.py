"""Shows what a recipe trains on, token by token: whether it is in the loss, its group, its score."""

from .page import page_settings, render_page
from .rows import parse_range, read_view
from .text import render_text


__all__ = ["page_settings", "parse_range", "read_view", "render_page", "render_text"]
