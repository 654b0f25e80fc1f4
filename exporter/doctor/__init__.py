"""Find out why few drafts are accepted: one experiment for each known cause."""
