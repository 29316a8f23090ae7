"""Recipes of published runs of Flow-GRPO on Wan, as they were run (docs/howto/published.md)."""
