"""Operators, a folder each."""
