"""Vocabulary clusters for drafters that have none: made, judged and drawn."""
