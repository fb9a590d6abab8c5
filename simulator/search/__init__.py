"""Search over policies: parts and their parameters, judged on some traces and confirmed on others."""
