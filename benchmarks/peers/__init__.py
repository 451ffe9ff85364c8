"""Other projects that do the same. None of their code is here: ``make bench-peers`` fetches it."""
