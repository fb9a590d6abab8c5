"""A published protocol, read from a file and run: models, benchmarks, policies, and the numbers reported."""
