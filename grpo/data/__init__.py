"""Prompts: files, generated ones, and those of an epoch."""
