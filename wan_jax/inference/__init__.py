"""From prompts to videos: embeddings, deterministic sampling, decoding, reward guidance."""
