"""What an optimization did: as data, on the terminal, as HTML."""
