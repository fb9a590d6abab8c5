"""One self-contained page of a replay: how policies compare, in which heads, and which tokens stay."""
