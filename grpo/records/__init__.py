"""Records of a run: its log, trackers and statistics."""
