"""The model definition: configurations, layers, target and drafter, written once and traced for every backend."""
