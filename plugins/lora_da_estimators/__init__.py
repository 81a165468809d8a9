"""Fisher estimators, one per module; each module is a plugin of its own."""
