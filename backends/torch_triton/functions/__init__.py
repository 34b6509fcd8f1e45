"""Functions that lowered graphs call where torch has no single one. Plain torch: traced, exported and differentiated."""
