"""Files: model folders, checkpoints, digests, locks, videos."""
