"""Lightning callbacks: what moves or watches a run from outside the module."""
