"""Rewards that other machines compute: server, client and wire format."""
