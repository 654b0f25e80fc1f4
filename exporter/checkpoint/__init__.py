"""Read Hugging Face checkpoint directories of a target and its drafter."""
