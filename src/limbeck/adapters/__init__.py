"""What a LoRA is: the Linears it changes, its factors, their gauge and algebra, injection into a model, and files."""
