"""The page of the `report` command: the measurements it shows, and its HTML."""
