"""Rewards for spelling: engines that read text, targets, rules."""
