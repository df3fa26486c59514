"""Reading documents and cutting them into windows and token-budget batches."""
