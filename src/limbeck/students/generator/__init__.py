"""The LoRA generator: condition states -> latents -> one query a layer, Linear and rank -> A and B."""
