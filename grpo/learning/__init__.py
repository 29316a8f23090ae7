"""What training methods share: the protocol, the two families, losses, the KL, selection."""
