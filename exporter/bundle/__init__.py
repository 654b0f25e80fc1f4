"""Export a bundle, and inspect one."""
