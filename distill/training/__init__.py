"""Training one model: the Lightning module, its callbacks, what is kept and how it goes on."""
