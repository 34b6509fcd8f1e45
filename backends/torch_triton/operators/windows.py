"""Windows operators."""
