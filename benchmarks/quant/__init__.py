"""What quantized weights and caches cost and gain."""
