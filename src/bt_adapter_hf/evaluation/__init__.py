"""Retrieval and recognition metrics, and the temporal controls that keep them honest."""
