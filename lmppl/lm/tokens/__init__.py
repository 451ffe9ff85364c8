"""Text and token sequences, without any network."""
