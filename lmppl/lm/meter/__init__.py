"""What language models do and how long it takes: tokens, seconds, share of the roofline."""
