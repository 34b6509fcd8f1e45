"""Many architectures with random weights, none downloaded: timm families and transformers types."""
