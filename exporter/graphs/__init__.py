"""The graphs of a bundle and the backends that write them."""
