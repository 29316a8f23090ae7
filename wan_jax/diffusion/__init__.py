"""Schedules, solvers, the SDE step, guidance and the choice of experts: pure functions."""
