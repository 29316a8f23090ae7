"""The sections of a recipe: every setting with its type, default, range and meaning."""
