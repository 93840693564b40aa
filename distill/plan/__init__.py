"""`distill plan`: what a run, or all jobs of a sweep, would take, before anything is trained."""
