"""Configs, models, processors and video decoding: what `trust_remote_code` ships, and nothing that needs the rest."""
