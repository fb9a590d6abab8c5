"""Recording: decode with the full cache, and write what attention used."""
