"""One self-contained page of a replay: who leads, at what memory, in which heads, and which tokens stay."""
