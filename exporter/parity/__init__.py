"""Whether a bundle computes what its checkpoints compute, judged against eager torch."""
