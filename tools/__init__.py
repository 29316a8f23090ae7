"""What no user runs."""
