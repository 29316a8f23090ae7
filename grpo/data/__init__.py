"""Prompts: files, epochs' draws, and the words that generated prompts are made of."""
