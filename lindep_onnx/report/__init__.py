"""What was done and measured, as values, words and pages."""
