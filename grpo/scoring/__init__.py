"""Rewards of an epoch and of an evaluation: collected, combined, judged on held-out prompts."""
