"""Kinds of change, each priced and applied alike."""
