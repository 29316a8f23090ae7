"""Devices and processes: meshes, sharded weights, several hosts, memory."""
