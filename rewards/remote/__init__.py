"""Rewards that other machines compute: client, server parts, wire format."""
