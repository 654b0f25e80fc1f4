"""Texts as token ids: those that travel with the package, a user's own, or what the target writes itself."""
