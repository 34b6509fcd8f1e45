"""Functions that lowered graphs call where torch has no single one; in plain torch, so they trace and differentiate."""
