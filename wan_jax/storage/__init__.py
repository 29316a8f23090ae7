"""Files: model folders, checkpoints, digests, locks, pictures and videos."""
