"""Many traces x policies x budgets: cells under content addresses, replayed in parallel, resumable."""
