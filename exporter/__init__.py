"""Export Gemma 4 and its MTP drafter into bundles. The folders, in the order of imports, follow the data."""
