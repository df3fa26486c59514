"""What a run will cost, before it costs it: documents, tokens, FLOPs, hours, memory and storage."""
