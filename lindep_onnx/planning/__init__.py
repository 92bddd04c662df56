"""From options and prices to one plan."""
