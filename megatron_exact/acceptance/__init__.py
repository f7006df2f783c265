"""The first hour on a real machine: one command that checks whether it computes what it should."""
