"""What subgraphs look like: one file per concept. Nothing here changes a graph."""
