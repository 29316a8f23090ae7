"""Devices and processes: mesh, sharding, several hosts, memory, offloading."""
