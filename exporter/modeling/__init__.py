"""What the model is: configurations, layers, target and drafter, defined once and traced for every backend."""
