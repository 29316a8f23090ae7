"""Scoring of videos: the reward pool, gathered scores, combined rewards, held-out evaluation."""
