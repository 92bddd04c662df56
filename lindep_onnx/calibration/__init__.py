"""What the data says about every layer."""
