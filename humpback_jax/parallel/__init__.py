"""Devices and processes: meshes, which axis goes where, several hosts."""
