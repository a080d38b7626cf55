"""Package data: the diffusion view of the embedded model, int8 per output row, and the built-in prompts."""
