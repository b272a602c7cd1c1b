"""Data: the embedded moving-digits world and (video, text) tables. Nothing is imported until a module is named."""
