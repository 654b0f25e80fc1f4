"""Make vocabulary clusters for drafters that have none, and measure and plot their recall."""
