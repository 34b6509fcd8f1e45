"""Losses operators."""
