"""What a run writes down: its log, trackers, statistics."""
