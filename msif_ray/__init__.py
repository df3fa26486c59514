"""Multi-stage influence functions on Ray: which pre-training documents made a fine-tuned model say that."""

__version__ = "0.1.0"
