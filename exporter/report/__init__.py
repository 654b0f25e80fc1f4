"""The `report` command's page: what it shows, measured, and drawn as HTML."""
