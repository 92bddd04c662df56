"""What the weights alone prove."""
