"""Devices: meshes, processes, compiled programs."""
