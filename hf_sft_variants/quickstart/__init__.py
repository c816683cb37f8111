"""A small real model and data for it on any machine, with or without the Hub."""

from .data import TASKS, build_splits, tagged_splits, write_data
from .model import MODEL_SOURCES, write_model


__all__ = ["MODEL_SOURCES", "TASKS", "build_splits", "tagged_splits", "write_data", "write_model"]
