"""From a configuration to checked values and objects."""
