"""Signals operators."""
