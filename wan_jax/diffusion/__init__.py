"""Schedules, solvers, the SDE step and guidance: pure functions."""
