"""The table of CIFAR-100: its cells, what was published, how they are run and shown."""
