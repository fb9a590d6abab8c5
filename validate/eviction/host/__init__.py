"""The back end of an evicting cache in host memory."""
