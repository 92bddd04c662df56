"""Training against the original, without labels."""
