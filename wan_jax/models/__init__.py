"""The networks: transformer, VAE, text encoder, tokenizer, adapters, and their configurations."""
