"""Rewards for spelling: OCR engines, the prompts' target texts, text comparison and rules."""
