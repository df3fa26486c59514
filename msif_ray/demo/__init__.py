"""The demo: real documents (the CIA World Factbook) and a small model pair that learned from them."""
