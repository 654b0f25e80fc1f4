"""What `make bench` runs: comparisons that decisions rest on. Nothing here is a test."""
