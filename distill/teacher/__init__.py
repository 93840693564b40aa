"""Frozen teachers, alone or several, and the answers of theirs that are kept."""
