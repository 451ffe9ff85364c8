"""One forward or backward pass of a Hugging Face model, fast."""
