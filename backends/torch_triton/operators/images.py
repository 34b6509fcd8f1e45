"""Images operators."""
