"""xform: a compiler and graph-rewriting framework for trained neural networks."""
