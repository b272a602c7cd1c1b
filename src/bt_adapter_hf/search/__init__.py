"""Encoding videos, the index over them, the contact sheet."""
