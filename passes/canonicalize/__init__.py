"""Raise every spelling of a concept to its semantic operator."""
