"""Models as GGUF files, which llama.cpp runs: packing, names, tokenizer, writing, and the check that the file is the model."""
