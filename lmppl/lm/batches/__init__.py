"""Many sequences at once: drawing, scoring and enumerating them in batches."""
